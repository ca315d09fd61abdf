package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"time"

	"github.com/google/uuid"

	"opamp-server/tests/peers/internal/event"
)

// peer is the reference client at work: cmd/agent, which is steered by commands and tells events.
type peer struct {
	running
	name   string
	input  io.WriteCloser
	events []event.Event // guarded by the mutex
}

type agentOptions struct {
	uid       string // a new one if empty
	token     string
	heartbeat time.Duration
}

// usual is an agent that is let in and shows itself every second.
func usual() agentOptions {
	return agentOptions{token: agentsToken, heartbeat: heartbeatInterval}
}

func (s *stage) startAgent(o agentOptions) *peer {
	if o.uid == "" {
		uid, err := uuid.NewV7()
		s.must("a uid", err)
		o.uid = uid.String()
	}
	p := &peer{
		running: running{uid: o.uid, started: time.Now(), exited: make(chan struct{})},
		name:    "peer-" + s.via.scheme,
	}
	p.process = exec.Command(s.programs.agent,
		"--server", s.server.url(s.via.scheme),
		"--uid", o.uid,
		"--name", p.name,
		"--token", o.token,
		"--heartbeat", o.heartbeat.String(),
	)
	input, err := p.process.StdinPipe()
	s.must("the agent's input", err)
	output, err := p.process.StdoutPipe()
	s.must("the agent's output", err)
	p.input = input
	p.process.Stderr = &p.running
	s.must("the agent starts", p.process.Start())
	s.agents = append(s.agents, &p.running)
	go p.listen(output)
	return p
}

func (p *peer) listen(output io.Reader) {
	lines := bufio.NewScanner(output)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var e event.Event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			e = event.Event{Event: event.Garbled, Error: err.Error()}
		}
		p.mutex.Lock()
		p.events = append(p.events, e)
		p.lines.Write(append(lines.Bytes(), '\n'))
		p.mutex.Unlock()
	}
	p.outcome = p.process.Wait()
	close(p.exited)
}

func (s *stage) tell(p *peer, command string) {
	_, err := io.WriteString(p.input, command+"\n")
	s.must("the agent takes "+command, err)
}

// mark is the place in the events from which a later look starts.
func (p *peer) mark() int {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return len(p.events)
}

// since lists the events of a kind from a mark on.
func (p *peer) since(mark int, kind string) []event.Event {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	var found []event.Event
	for _, e := range p.events[mark:] {
		if e.Event == kind {
			found = append(found, e)
		}
	}
	return found
}

func (p *peer) last(kind string) (event.Event, error) {
	all := p.since(0, kind)
	if len(all) == 0 {
		return event.Event{}, fmt.Errorf("the agent had no %q event", kind)
	}
	return all[len(all)-1], nil
}

// had answers whether at least count events of the kind came since the mark.
func (p *peer) had(mark, count int, kind string) func() error {
	return func() error {
		if got := len(p.since(mark, kind)); got < count {
			return fmt.Errorf("%d of %d %q events", got, count, kind)
		}
		return nil
	}
}

// sane: whatever happens, the reference client must never meet bytes it cannot read nor an error answer.
func (p *peer) sane() error {
	for _, kind := range []string{event.Garbled, event.BadCommand, event.ErrorResponse} {
		if found := p.since(0, kind); len(found) > 0 {
			return fmt.Errorf("%s: %s", kind, strings.TrimSpace(found[0].Error))
		}
	}
	return nil
}
