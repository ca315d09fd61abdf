package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"time"

	"opamp-server/tests/peers/internal/event"
)

var scenarios = []scenario{
	{name: "online", play: comesOnline},
	{name: "reports", play: reports},
	{name: "stop", play: stops},
	{name: "crash", play: crashes},
	{name: "restart", play: serverRestarts},
	{name: "server-crash", play: serverCrashes},
	{name: "amnesia", play: serverForgets},
	{name: "silence", play: fallsSilent, webSocketOnly: true},
	{name: "token", play: showsToken},
}

const (
	onlineLimit = time.Second
	reportLimit = 2 * time.Second // from the agent's word to the REST answer
	endLimit    = 2 * time.Second // from an end that can be seen to the verdict

	// A silent poller's deadline is three of its longest recent gaps and its verdict waits one flush; gaps stretch on a
	// busy machine.
	pollerSilentLimit = 5*heartbeatTimeout + flushInterval

	// The library backs off by itself; a server that is stopping may also ask pollers to stay away for up to 60 s.
	returnLimit = 65 * time.Second

	// REST moments have milliseconds, and a report is on its way for a moment.
	slack = 500 * time.Millisecond
)

// comesOnline: a report makes an agent online, on either transport.
func comesOnline(s *stage) {
	srv := s.startServer()
	p := s.startAgent(usual())
	s.need("online within 1s of its start", p.started, onlineLimit, srv.online(p))

	rows, err := srv.history(p)
	if err == nil && (len(rows) != 1 || !rows[0].open()) {
		err = fmt.Errorf("%d rows", len(rows))
	}
	s.check("one connection, open", err)
	if len(rows) > 0 && rows[0].Transport != s.via.word {
		err = fmt.Errorf("transport is %q", rows[0].Transport)
	}
	s.check("the connection names its transport", err)

	s.within("the library hears the server's capabilities", p.started, reportLimit, func() error {
		first := p.since(0, event.Message)
		if len(first) == 0 || first[0].Capabilities == nil || *first[0].Capabilities&1 == 0 {
			return errors.New("the first message states no AcceptsStatus")
		}
		return nil
	})
	s.within("every report is answered", p.started, 10*time.Second, func() error {
		return errors.Join(p.had(0, 4, event.Report)(), p.had(0, 4, event.Message)())
	})
	s.check("the library understands all it hears", p.sane())
}

// reports: what the library tells is what the API shows.
func reports(s *stage) {
	srv := s.startServer()
	p := s.startAgent(usual())
	sees := func(name string, probe func(agentDetail) error) {
		s.within(name, time.Now(), reportLimit, func() error {
			detail, err := srv.detail(p)
			if err != nil {
				return err
			}
			return probe(detail)
		})
	}
	s.need("online", p.started, reportLimit, srv.online(p))

	sees("name and description", func(d agentDetail) error {
		switch {
		case d.ID != p.uid, d.Name != p.name:
			return fmt.Errorf("id %s, name %q", d.ID, d.Name)
		case d.Description.Identifying["service.name"] != p.name:
			return fmt.Errorf("identifying: %v", d.Description.Identifying)
		case d.Description.NonIdentifying["os.type"] != "linux":
			return fmt.Errorf("non-identifying: %v", d.Description.NonIdentifying)
		}
		return nil
	})
	sees("capabilities by name", func(d agentDetail) error {
		if !slices.ContainsFunc(d.Capabilities, func(name string) bool {
			return strings.EqualFold(strings.ReplaceAll(name, "_", ""), "ReportsHealth")
		}) {
			return fmt.Errorf("capabilities: %v", d.Capabilities)
		}
		return nil
	})
	sees("healthy at first", func(d agentDetail) error {
		if d.Healthy == nil || !*d.Healthy || d.Health == nil || !d.Health.Healthy {
			return fmt.Errorf("healthy %v, health %+v", d.Healthy, d.Health)
		}
		return nil
	})

	s.tell(p, `health false "disk full"`)
	sees("unhealthy, with its error, and still online", func(d agentDetail) error {
		switch {
		case d.Healthy == nil || *d.Healthy || d.Health == nil || d.Health.Healthy:
			return errors.New("still healthy")
		case d.Health.LastError != "disk full" || d.Health.Status != "degraded":
			return fmt.Errorf("health: %+v", *d.Health)
		case d.Status != "online" || !d.Connected:
			return fmt.Errorf("status %s, connected %t: health must not change it", d.Status, d.Connected)
		}
		return nil
	})

	s.tell(p, `config "receivers:\n  otlp: {}\nexporters:\n  otlp:\n    password: hunter2-plain\n"`)
	sees("effective config", func(d agentDetail) error {
		file, found := d.EffectiveConfig["collector.yaml"]
		if !found || !strings.Contains(file.Body, "receivers:") || file.ContentType != "text/yaml" {
			return fmt.Errorf("effective_config: %+v", d.EffectiveConfig)
		}
		return nil
	})
	sees("secrets in it masked", func(d agentDetail) error {
		if !strings.Contains(d.raw, "password") || strings.Contains(d.raw, "hunter2-plain") {
			return errors.New("the password is shown, or its line is gone")
		}
		return nil
	})

	s.tell(p, "custom com.example.pause/v1,com.example.trace")
	sees("custom capabilities", func(d agentDetail) error {
		wanted := []string{"com.example.pause/v1", "com.example.trace"}
		got := slices.Sorted(slices.Values(d.CustomCapabilities))
		if !slices.Equal(got, wanted) {
			return fmt.Errorf("custom_capabilities: %v", d.CustomCapabilities)
		}
		return nil
	})

	s.tell(p, "describe deployment.environment.name staging")
	sees("a changed description, nothing else lost", func(d agentDetail) error {
		switch {
		case d.Description.NonIdentifying["deployment.environment.name"] != "staging":
			return fmt.Errorf("non-identifying: %v", d.Description.NonIdentifying)
		case d.Description.NonIdentifying["os.type"] != "linux", len(d.CustomCapabilities) != 2, len(d.EffectiveConfig) != 1:
			return fmt.Errorf("it forgot something: %s", d.raw)
		case d.Healthy == nil || *d.Healthy:
			return errors.New("it forgot that the agent is unhealthy")
		}
		return nil
	})
	s.check("the library understands all it hears", p.sane())
}

// stops: the library's own orderly end.
func stops(s *stage) {
	srv := s.startServer()
	p := s.settled(usual())

	s.tell(p, "stop")
	s.need("the library stops", time.Now(), 10*time.Second, p.had(0, 1, event.Stopped))
	stopped := time.Now()
	s.check("the agent exits", p.awaitExit(5*time.Second))

	// Whether the library says goodbye over plain HTTP depends on its version; the bytes on the wire decide.
	goodbye := slices.ContainsFunc(p.since(0, event.Report), func(e event.Event) bool { return e.AgentDisconnect })
	if s.via == webSocket && !goodbye {
		s.check("the library says goodbye", errors.New("no agent_disconnect was sent"))
	}
	if goodbye {
		s.need("offline at once, agent_disconnect", stopped, endLimit, srv.offline(p, "agent_disconnect"))
		row := s.newest(p)
		var err error
		if row.DisconnectedBy != nil {
			err = fmt.Errorf("an end that was seen has disconnected_by %v", row.DisconnectedBy)
		}
		s.check("the end was seen, duration_seconds is there", err)
	} else {
		s.need("offline by its deadline, heartbeat_timeout", stopped, pollerSilentLimit, srv.offline(p, "heartbeat_timeout"))
		s.checkf("the end was not seen, duration_seconds is there", s.endedWithLastPoll(p),
			"this library version sends no agent_disconnect over %s", s.via.label)
	}
	s.check("the library understands all it hears", p.sane())
}

// crashes: kill -9 of the agent.
func crashes(s *stage) {
	srv := s.startServer()
	p := s.settled(usual())

	p.kill()
	killed := time.Now()
	if s.via == webSocket {
		s.need("offline at once, connection_lost", killed, endLimit, srv.offline(p, "connection_lost"))
		row := s.newest(p)
		var err error
		if row.DisconnectedAt.After(killed.Add(slack)) {
			err = fmt.Errorf("it ended at %v, after it was known to", row.DisconnectedAt)
		}
		s.check("the row ends no later than the agent", err)
		return
	}
	s.need("offline by its deadline, heartbeat_timeout", killed, pollerSilentLimit, srv.offline(p, "heartbeat_timeout"))
	s.check("the row ends with the last poll, disconnected_by says when that was known", s.endedWithLastPoll(p))
}

// serverRestarts: SIGTERM and a new start.
func serverRestarts(s *stage) {
	srv := s.startServer()
	options := usual()
	if s.via == webSocket {
		// Without heartbeats nothing the agent says can get lost between the Close frame and its reading.
		options.heartbeat = 0
	}
	p := s.settled(options)
	if s.via == webSocket {
		s.holds("pings keep a link without heartbeats alive", heartbeatTimeout*3/2, srv.online(p))
	}

	before := s.newest(p)
	mark := p.mark()
	s.check("SIGTERM: exit 0 in time", srv.end(syscall.SIGTERM, drain+5*time.Second))
	if s.via == webSocket {
		s.within("SIGTERM: the agent got Close 1012", time.Now(), reportLimit, p.closedWith(mark, 1012))
	}
	s.run()
	ready := time.Now()
	s.need("the agent returns by itself", ready, returnLimit, s.returned(p, mark))
	back := time.Now()

	s.check("the history tells the restart", s.historyOver(p, before, p.away(mark), "server_shutdown"))
	s.check("the restart made nobody offline", s.neverOffline(p, ready, back))

	if reports := p.since(mark, event.Report); s.via == webSocket {
		var err error
		if len(reports) == 0 || slices.Contains(reports[0].Parts, "agent_description") {
			err = fmt.Errorf("its reports since: %+v", reports)
		}
		s.check("the agent continues without its description", err)
	}
	answered := p.mark()
	s.tell(p, `health false "after the restart"`)
	s.within("its next report is understood on top of what was known", time.Now(), reportLimit, func() error {
		d, err := srv.detail(p)
		switch {
		case err != nil:
			return err
		case d.Health == nil || d.Health.LastError != "after the restart":
			return errors.New("the new health is not there")
		case d.Name != p.name || d.Description.NonIdentifying["os.type"] != "linux" || len(d.EffectiveConfig) != 1:
			return fmt.Errorf("it forgot something: %s", d.raw)
		}
		return nil
	})
	s.within("that report is answered", time.Now(), reportLimit, p.had(answered, 1, event.Message))
	s.check("after an orderly stop no full state is asked for", p.askedForFullState(mark))
	s.check("the library understands all it hears", p.sane())
}

// serverCrashes: kill -9 of the server and a new start.
func serverCrashes(s *stage) {
	srv := s.startServer()
	p := s.settled(usual())

	before := s.newest(p)
	mark := p.mark()
	_ = srv.end(syscall.SIGKILL, 5*time.Second) // its exit says "killed", of course
	s.run()
	ready := time.Now()
	s.need("kill -9 of the server: the agent returns by itself", ready, returnLimit, s.returned(p, mark))
	back := time.Now()

	s.check("the history tells the crash", s.historyOver(p, before, p.away(mark), "server_lost"))
	s.check("the crash made nobody offline", s.neverOffline(p, ready, back))
	s.check("the library understands all it hears", p.sane())
}

// serverForgets: an agent that continues meets a server that knows nothing. It shows, too, that ReportFullState is seen
// here when it is sent, without which "none was asked for" would mean nothing.
func serverForgets(s *stage) {
	srv := s.startServer()
	p := s.settled(usual())

	mark := p.mark()
	_ = srv.end(syscall.SIGKILL, 5*time.Second) // an orderly stop would ask pollers to stay away for up to a minute
	s.must("its database goes", srv.forget())
	s.run()
	s.need("a server that lost its database asks for full state", time.Now(), returnLimit, func() error {
		if p.askedForFullState(mark) == nil {
			return errors.New("no message carried ReportFullState")
		}
		return nil
	})
	s.within("and knows the agent again", time.Now(), reportLimit, func() error {
		d, err := srv.detail(p)
		switch {
		case err != nil:
			return err
		case d.Name != p.name || d.Description.Identifying["service.name"] != p.name || len(d.EffectiveConfig) != 1:
			return fmt.Errorf("it knows %s", d.raw)
		}
		return srv.online(p)()
	})
	settled := p.mark()
	s.within("three further reports are answered", time.Now(), 10*time.Second, p.had(settled, 3, event.Message))
	s.check("it asks once, not for ever", p.askedForFullState(settled))
	s.check("the library understands all it hears", p.sane())
}

// fallsSilent: SIGSTOP and SIGCONT of an agent whose socket stays open.
func fallsSilent(s *stage) {
	srv := s.startServer()
	p := s.settled(usual())

	mark := p.mark()
	stopped := time.Now()
	s.must("SIGSTOP", p.signal(syscall.SIGSTOP))
	s.need("SIGSTOP: offline within the time-out and 1s, heartbeat_timeout", stopped, heartbeatTimeout+time.Second,
		srv.offline(p, "heartbeat_timeout"))
	s.check("the row ends with the last sign of life, judged a whole time-out later",
		endedUnseen(s.newest(p), p.started, stopped.Add(slack)))

	s.must("SIGCONT", p.signal(syscall.SIGCONT))
	s.need("SIGCONT: it returns", time.Now(), returnLimit, srv.online(p))
	s.within("the agent had got Close 1001", time.Now(), reportLimit, p.closedWith(mark, 1001))
	rows, err := srv.history(p)
	if err == nil && (len(rows) != 2 || !rows[0].open()) {
		err = fmt.Errorf("%d rows", len(rows))
	}
	s.check("two rows, the newest open", err)
	s.check("the library understands all it hears", p.sane())
}

// showsToken: who has no token or a wrong one is refused before anything is known of it.
func showsToken(s *stage) {
	srv := s.startServer()
	for _, attempt := range []struct{ what, token, answer string }{
		{"a wrong token", "not-the-token", "invalid_agent_token"},
		{"no token", "", "agent_token_required"},
	} {
		options := usual()
		options.token = attempt.token
		p := s.startAgent(options)
		s.within(attempt.what+": 401 and "+attempt.answer, p.started, reportLimit, func() error {
			refused := p.since(0, event.Refused)
			switch {
			case len(refused) == 0:
				return errors.New("no refusal yet")
			case refused[0].Status != 401, !strings.Contains(refused[0].Body, `"`+attempt.answer+`"`):
				return fmt.Errorf("refused with %d %s", refused[0].Status, refused[0].Body)
			}
			return nil
		})
		// Over plain HTTP the library tells a final status to its log alone.
		heard := event.ConnectFailed
		if s.via == plainHTTP {
			heard = event.LogError
		}
		s.within(attempt.what+": the library reports the failure", p.started, reportLimit, p.had(0, 1, heard))
		var err error
		if connected := p.since(0, event.Connected); len(connected) > 0 {
			err = errors.New("the library thinks it is connected")
		}
		_, found := srv.status(p)
		if refused := new(refusal); err == nil && !(errors.As(found, &refused) && refused.status == 404) {
			err = fmt.Errorf("REST knows the agent, or something else is wrong: %v", found)
		}
		s.check(attempt.what+": no trace of the agent", err)
		p.kill()
	}

	p := s.startAgent(usual())
	s.within("the right token works", p.started, reportLimit, srv.online(p))
	s.check("the library understands all it hears", p.sane())
}

// settled starts an agent and waits until it is known and, where it sends any, has had some heartbeats answered, so that
// the server knows its pace.
func (s *stage) settled(o agentOptions) *peer {
	p := s.startAgent(o)
	_, err := s.until(p.started, 5*time.Second, s.server.online(p))
	s.must("an agent is online", err)
	if o.heartbeat > 0 {
		_, err = s.until(time.Now(), 10*time.Second, p.had(0, 4, event.Message))
		s.must("its heartbeats are answered", err)
	}
	return p
}

func (s *stage) newest(a agent) connection {
	rows, err := s.server.history(a)
	if err == nil && len(rows) == 0 {
		err = errors.New("no rows")
	}
	s.must("the connection history", err)
	return rows[0]
}

// endedWithLastPoll checks the newest row of a plain HTTP agent that vanished.
func (s *stage) endedWithLastPoll(p *peer) error {
	poll, err := p.last(event.Report)
	if err != nil {
		return err
	}
	return endedUnseen(s.newest(p), poll.At.Add(-slack/10), poll.At.Add(slack))
}

// endedUnseen checks the row of an agent that fell silent: it ends with the last sign of life, which came between these two
// moments, and the verdict fell a whole time-out later.
func endedUnseen(row connection, from, to time.Time) error {
	switch {
	case row.DisconnectedAt == nil:
		return errors.New("it is open")
	case row.DisconnectedBy == nil:
		return errors.New("disconnected_by is missing")
	case row.DisconnectedAt.After(to):
		return fmt.Errorf("it ended at %v, the last sign of life came before %v", row.DisconnectedAt, to)
	case row.DisconnectedAt.Before(from):
		return fmt.Errorf("it ended at %v, the last sign of life came after %v", row.DisconnectedAt, from)
	case row.DisconnectedBy.Sub(*row.DisconnectedAt) < heartbeatTimeout-slack/10:
		return fmt.Errorf("judged after %v of silence", row.DisconnectedBy.Sub(*row.DisconnectedAt))
	}
	return nil
}

// returned: the agent was answered after the mark and is online.
func (s *stage) returned(p *peer, mark int) func() error {
	return func() error {
		return errors.Join(p.had(mark, 1, event.Message)(), s.server.online(p)())
	}
}

// historyOver checks the rows of an agent that outlived its server. The old row is closed with the reason of the server's
// end and a new one is open. A plain HTTP row belongs to no process and may also go on; if its agent stayed away for
// longer than the time-out, its own deadline may have ended it.
func (s *stage) historyOver(a agent, before connection, away time.Duration, reason string) error {
	rows, err := s.server.history(a)
	if err != nil {
		return err
	}
	if len(rows) == 0 || !rows[0].open() {
		return errors.New("no open row is the newest one")
	}
	if s.via == plainHTTP && len(rows) == 1 && rows[0].ID == before.ID {
		return nil
	}
	if len(rows) != 2 || rows[1].ID != before.ID {
		return fmt.Errorf("%d rows, the old one was %s", len(rows), before.ID)
	}
	fresh, old := rows[0], rows[1]
	silent := s.via == plainHTTP && away >= s.server.timeout && old.reason() == "heartbeat_timeout"
	if old.reason() != reason && !silent {
		return fmt.Errorf("the old row says %s, not %s", old.reason(), reason)
	}
	if reason == "server_lost" && !silent {
		switch {
		case old.DisconnectedBy == nil:
			return errors.New("server_lost without disconnected_by")
		case old.DisconnectedBy.After(fresh.ConnectedAt):
			return fmt.Errorf("lost until %v, but back at %v", old.DisconnectedBy, fresh.ConnectedAt)
		}
	}
	return nil
}

// away is how long the agent went without an answer around the mark.
func (p *peer) away(mark int) time.Duration {
	all, later := p.since(0, event.Message), p.since(mark, event.Message)
	if len(later) == 0 || len(later) == len(all) {
		return 0
	}
	return later[0].At.Sub(all[len(all)-len(later)-1].At)
}

// neverOffline: an end that the server caused makes nobody offline who returns in time, which is twice the time-out.
func (s *stage) neverOffline(a agent, ready, back time.Time) error {
	if back.Sub(ready) > 2*s.server.timeout-time.Second {
		return nil // a verdict was due
	}
	transitions, err := s.server.transitions(a)
	if err != nil {
		return err
	}
	for _, t := range transitions {
		if t.To != "online" {
			return fmt.Errorf("%s since %v, reason %s", t.To, t.At, text(t.Reason))
		}
	}
	return nil
}

// askedForFullState is an error if any message since the mark carried ReportFullState.
func (p *peer) askedForFullState(mark int) error {
	for _, e := range p.since(mark, event.Message) {
		if e.ReportFullState != nil && *e.ReportFullState {
			return fmt.Errorf("asked at %v", e.At)
		}
	}
	return nil
}

func (p *peer) closedWith(mark, code int) func() error {
	return func() error {
		closed := p.since(mark, event.Close)
		switch {
		case len(closed) == 0:
			return errors.New("no Close frame")
		case closed[0].Code != code:
			return fmt.Errorf("Close %d %q", closed[0].Code, closed[0].Body)
		}
		return nil
	}
}
