package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"strings"
	"time"
)

const pollPace = 20 * time.Millisecond

type transport struct {
	label  string // in the output
	scheme string // of the agent's URL
	word   string // in the history
}

var (
	webSocket = transport{label: "websocket", scheme: "ws", word: "websocket"}
	plainHTTP = transport{label: "plain http", scheme: "http", word: "http"}
)

type scenario struct {
	name          string
	webSocketOnly bool
	play          func(*stage)
}

// stage is what one scenario has: a folder, a server, its agents.
type stage struct {
	ctx      context.Context
	tally    *tally
	programs programs
	via      transport
	dir      string
	server   *server
	agents   []*running
	failed   bool // some check of this scenario did
}

// over ends a scenario in which nothing further can be checked; the reason has been counted.
type over struct{}

func play(ctx context.Context, t *tally, p programs, via transport, s scenario) {
	dir, err := os.MkdirTemp("", "opamp-peers-")
	if err != nil {
		t.check(via.label, s.name, err, "")
		return
	}
	st := &stage{ctx: ctx, tally: t, programs: p, via: via, dir: dir}
	defer func() {
		cause := recover()
		if _, expected := cause.(over); cause != nil && !expected {
			st.check(s.name, fmt.Errorf("panic: %v\n%s", cause, debug.Stack()))
		}
		for _, a := range st.agents {
			a.kill()
		}
		if st.server != nil {
			st.server.kill()
		}
		if st.failed {
			st.explain(s.name)
		}
		_ = os.RemoveAll(dir)
	}()
	s.play(st)
}

// explain shows what server and agents said; without it a failure on another machine tells nothing.
func (s *stage) explain(name string) {
	s.tally.mutex.Lock()
	defer s.tally.mutex.Unlock()
	fmt.Printf("--- %s/%s: what the server said last\n%s", s.via.scheme, name, indent(s.server.logTail(40)))
	for _, a := range s.agents {
		fmt.Printf("--- %s/%s: what agent %s said last\n%s", s.via.scheme, name, a.uid, indent(a.tail(40)))
	}
}

func indent(text string) string {
	text = strings.TrimRight(text, "\n")
	if text == "" {
		return "    (nothing)\n"
	}
	return "    " + strings.ReplaceAll(text, "\n", "\n    ") + "\n"
}

// check counts one fact that is already known.
func (s *stage) check(name string, err error) bool {
	return s.checkf(name, err, "")
}

// checkf is check with a remark for the reader.
func (s *stage) checkf(name string, err error, format string, args ...any) bool {
	s.failed = s.failed || err != nil
	return s.tally.check(s.via.label, name, err, fmt.Sprintf(format, args...))
}

// must ends the scenario if the harness itself does not work.
func (s *stage) must(what string, err error) {
	if err != nil {
		s.check(what, err)
		panic(over{})
	}
}

// within waits until the probe finds no fault, at most until start + limit. A success seen too late is a failure.
func (s *stage) within(name string, start time.Time, limit time.Duration, probe func() error) bool {
	took, err := s.until(start, limit, probe)
	if err != nil {
		return s.checkf(name, fmt.Errorf("not within %v: %w", limit, err), "")
	}
	return s.checkf(name, nil, "%.2fs", took.Seconds())
}

// need is within for what the rest of the scenario stands on.
func (s *stage) need(name string, start time.Time, limit time.Duration, probe func() error) {
	if !s.within(name, start, limit, probe) {
		panic(over{})
	}
}

// holds looks again and again for the whole span; every look must find no fault.
func (s *stage) holds(name string, span time.Duration, probe func() error) bool {
	start := time.Now()
	for time.Since(start) < span && s.ctx.Err() == nil {
		if err := probe(); err != nil {
			return s.check(name, fmt.Errorf("after %.2fs: %w", time.Since(start).Seconds(), err))
		}
		time.Sleep(pollPace)
	}
	return s.checkf(name, s.ctx.Err(), "for %v", span)
}

func (s *stage) until(start time.Time, limit time.Duration, probe func() error) (time.Duration, error) {
	for {
		err := probe()
		took := time.Since(start)
		switch {
		case s.ctx.Err() != nil:
			return took, errors.New("interrupted")
		case err == nil && took <= limit:
			return took, nil
		case err == nil:
			return took, fmt.Errorf("true only after %.2fs", took.Seconds())
		case took > limit:
			return took, err
		}
		time.Sleep(pollPace)
	}
}
