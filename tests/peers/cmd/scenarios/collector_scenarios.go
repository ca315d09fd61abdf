package main

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Both transports run at once, each in its own list.
var collectorScenarios = []scenario{
	{name: "collector-reports", play: collectorReports},
	{name: "collector-restart", play: collectorRestarts},
	{name: "collector-reload", play: collectorReloads},
	{name: "collector-crash", play: collectorCrashes},
	{name: "collector-silence", play: collectorFallsSilent},
	{name: "collector-server-restart", play: func(s *stage) { collectorOutlives(s, syscall.SIGTERM, "server_shutdown") }},
	{name: "collector-server-crash", play: func(s *stage) { collectorOutlives(s, syscall.SIGKILL, "server_lost") }},
	{name: "collector-amnesia", play: collectorMeetsAmnesia},
	{name: "collector-token", play: collectorShowsToken},
	{name: "collector-token-later", play: collectorIsLetInLater},
}

const (
	collectorStartLimit = 15 * time.Second
	collectorStopLimit  = 15 * time.Second

	// Longer than half of the longest time that a collector may stay away from a server that comes back (returnLimit), so
	// that the server's word on its return can be taken literally: twice this, and nobody is called offline.
	patientTimeout = 35 * time.Second
)

// ready: the server shows a collector that has started wholly and told so, in its present life. It connects before its
// pipelines run: its first report says "not healthy", and whether it has an effective configuration is a matter of luck.
func (s *stage) ready(c *collector) func() error {
	return func() error {
		d, err := s.server.detail(c)
		switch {
		case err != nil:
			return errors.Join(err, c.alive())
		case d.Healthy == nil || !*d.Healthy || d.Health == nil || d.Health.Status != "StatusOK":
			return fmt.Errorf("health: %+v", d.Health)
		case d.Health.At.Before(c.started.Truncate(time.Millisecond)):
			return fmt.Errorf("its health is that of %v, before it started", d.Health.At)
		case d.Description.NonIdentifying["deployment.environment.name"] != c.config.Environment:
			return fmt.Errorf("non-identifying: %v", d.Description.NonIdentifying)
		case !strings.Contains(d.EffectiveConfig[""].Body, "deployment.environment.name: "+c.config.Environment+"\n"):
			return fmt.Errorf("effective_config: %s", d.EffectiveConfig[""].Body)
		}
		return s.server.online(c)()
	}
}

// settledCollector starts a collector and waits until it is ready.
func (s *stage) settledCollector() *collector {
	c := s.configureCollector()
	s.start(c)
	s.need("the collector is online and healthy", c.started, collectorStartLimit, s.ready(c))
	return c
}

// rows checks how an agent's connections ended, newest first; "" is an open one.
func (s *stage) rows(a agent, reasons ...string) func() error {
	return func() error {
		rows, err := s.server.history(a)
		if err != nil {
			return err
		}
		var found []string
		for _, row := range rows {
			if row.open() {
				found = append(found, "")
			} else {
				found = append(found, row.reason())
			}
		}
		if !slices.Equal(found, reasons) {
			return fmt.Errorf("the rows end with %q, not %q", found, reasons)
		}
		return nil
	}
}

// alone: there is one record, and nothing is retired.
func (s *stage) alone(a agent) error {
	everyone, err := s.server.everyone()
	if err == nil && !slices.Equal(everyone, []string{a.instance()}) {
		err = fmt.Errorf("the records are %v", everyone)
	}
	return err
}

// quits ends the collector by SIGTERM and returns when it has gone.
func (s *stage) quits(c *collector) time.Time {
	s.must("SIGTERM", c.signal(syscall.SIGTERM))
	s.check("the collector stops in order", c.awaitExit(collectorStopLimit))
	return time.Now()
}

// collectorReports: what the extension tells is what the API shows.
func collectorReports(s *stage) {
	srv := s.startServer()
	c := s.settledCollector()
	d, err := srv.detail(c)
	s.must("the collector's detail", err)

	wanted := map[string]any{
		"service.instance.id": c.uid,
		"service.name":        collectorName,
		"service.version":     collectorVersion,
	}
	if d.ID != c.uid || d.Name != collectorName || !maps.Equal(d.Description.Identifying, wanted) {
		err = fmt.Errorf("id %s, name %q, identifying: %v", d.ID, d.Name, d.Description.Identifying)
	}
	s.check("service.name, service.version and service.instance.id", err)

	other := d.Description.NonIdentifying
	err = nil
	for _, key := range []string{"os.type", "os.description", "host.name", "host.arch"} {
		if value, _ := other[key].(string); value == "" {
			err = fmt.Errorf("%s is missing: %v", key, other)
		}
	}
	if err == nil && other["os.type"] != "linux" && other["os.type"] != "darwin" {
		err = fmt.Errorf("os.type is %v", other["os.type"])
	}
	s.check("attributes of its host", err)

	// Everything it states. That it states no ReportsHeartbeat and no ReportsRemoteConfig is why it must not be judged by
	// heartbeats and is offered no configuration.
	capabilities := []string{"ReportsAvailableComponents", "ReportsEffectiveConfig", "ReportsHealth", "ReportsStatus"}
	err = nil
	if got := slices.Sorted(slices.Values(d.Capabilities)); !slices.Equal(got, capabilities) {
		err = fmt.Errorf("capabilities: %v", got)
	}
	s.check("capabilities by name", err)

	s.check("the health of every component", healthTree(d.Health))
	s.check("the components it is built from", inventory(d))
	s.check("effective configuration, secrets masked", effective(c, d))

	s.check("one record", s.alone(c))
	s.check("one connection, open", s.rows(c, "")())
	if row := s.newest(c); row.Transport != s.via.word {
		err = fmt.Errorf("transport is %q", row.Transport)
	}
	s.check("the connection names its transport", err)

	// Over WebSocket its first heartbeat is half a minute away: only the server's pings keep it online.
	s.holds("it stays online and healthy", 2*heartbeatTimeout, s.ready(c))
	s.check("still one connection", s.rows(c, "")())
}

func healthTree(top *componentHealth) error {
	for _, path := range [][]string{
		{"extensions", "extension:opamp"},
		{"pipeline:traces", "receiver:otlp"},
		{"pipeline:traces", "exporter:otlp_http"},
	} {
		at := *top
		for _, step := range path {
			next, found := at.Parts[step]
			if !found {
				return fmt.Errorf("%s is missing in %+v", step, at)
			}
			if !next.Healthy || next.Status != "StatusOK" || next.LastError != "" {
				return fmt.Errorf("%s: %+v", step, next)
			}
			at = next
		}
	}
	return nil
}

// inventory: the collector tells a hash by itself and its components only in answer to a question for them or for its full
// state, so that only the hash is certain to be known.
func inventory(d agentDetail) error {
	if hash, err := hex.DecodeString(d.ComponentsHash); err != nil || len(hash) != sha256.Size {
		return fmt.Errorf("components_hash is %q", d.ComponentsHash)
	}
	if d.AvailableComponents == nil {
		return nil
	}
	for kind, wanted := range map[string]struct{ name, module string }{
		"receivers":  {"otlp", "go.opentelemetry.io/collector/receiver/otlpreceiver v" + collectorVersion},
		"exporters":  {"otlp_http", "go.opentelemetry.io/collector/exporter/otlphttpexporter v" + collectorVersion},
		"extensions": {"opamp", "/extension/opampextension v" + collectorVersion},
	} {
		module, _ := d.AvailableComponents[kind].Parts[wanted.name].Metadata["code.namespace"].(string)
		if !strings.HasSuffix(module, wanted.module) {
			return fmt.Errorf("%s: %+v", kind, d.AvailableComponents[kind])
		}
	}
	return nil
}

// effective: the collector reports one file without a name, in which all defaults are filled in.
func effective(c *collector, d agentDetail) error {
	file, found := d.EffectiveConfig[""]
	if !found || len(d.EffectiveConfig) != 1 || file.ContentType != "text/yaml" {
		return fmt.Errorf("effective_config: %+v", d.EffectiveConfig)
	}
	lines := strings.FieldsFunc(strings.NewReplacer("'", "", `"`, "").Replace(file.Body), func(c rune) bool { return c == '\n' })
	for _, part := range [][]string{
		{"otlp_http:", "compression: gzip"}, // a default
		{"instance_uid: " + c.uid},
		{"endpoint: http://***@127.0.0.1:9/"},
		{"- name: x-api-key", "value: ***"},
		{"- name: vault.token", "value: ***"},
	} {
		if !follow(lines, part) {
			return fmt.Errorf("%q is missing in\n%s", part, file.Body)
		}
	}
	for where, secret := range c.config.Secrets {
		if strings.Contains(d.raw, secret) {
			return fmt.Errorf("the secret in the %s is shown", where)
		}
	}
	if strings.Contains(d.raw, c.config.Token) {
		return errors.New("the agents' token is shown")
	}
	return nil
}

// follow: the wanted lines stand there one below the other, however indented.
func follow(lines, wanted []string) bool {
	for i := range lines {
		if i+len(wanted) <= len(lines) && slices.EqualFunc(lines[i:i+len(wanted)], wanted, func(line, want string) bool {
			return strings.TrimSpace(line) == want
		}) {
			return true
		}
	}
	return false
}

// collectorRestarts: SIGTERM, and a start with the same instance_uid.
func collectorRestarts(s *stage) {
	srv := s.startServer()
	c := s.settledCollector()

	if s.via == plainHTTP {
		// The extension says no goodbye over plain HTTP. A collector that is back before its deadline never was away: its
		// polls go on, on the same row, with a numbering that starts again.
		s.quits(c)
		s.start(c)
		s.need("back in time: the collector is online and healthy", c.started, collectorStartLimit, s.ready(c))
		s.check("back in time: its connection goes on", s.rows(c, "")())

		gone := s.quits(c)
		s.need("offline by its deadline, heartbeat_timeout", gone, pollerSilentLimit, srv.offline(c, "heartbeat_timeout"))
		s.check("the row ends with the last poll, disconnected_by says when that was known",
			endedUnseen(s.newest(c), gone.Add(-2*collectorPolls-slack), gone.Add(slack)))
		s.start(c)
		s.need("the collector is online and healthy again", c.started, collectorStartLimit, s.ready(c))
		s.check("two connections, the newest open", s.rows(c, "", "heartbeat_timeout")())
		s.check("one record", s.alone(c))
		return
	}

	// Over WebSocket it sends agent_disconnect and then a Close frame; the first of them is the reason.
	gone := s.quits(c)
	s.need("offline at once, agent_disconnect", gone, endLimit, srv.offline(c, "agent_disconnect"))
	var err error
	if row := s.newest(c); row.DisconnectedBy != nil {
		err = fmt.Errorf("an end that was seen has disconnected_by %v", row.DisconnectedBy)
	}
	s.check("the end was seen", err)
	s.start(c)
	s.need("the collector is online and healthy again", c.started, collectorStartLimit, s.ready(c))
	s.check("two connections, the newest open", s.rows(c, "", "agent_disconnect")())
	s.check("one record", s.alone(c))
}

// collectorReloads: SIGHUP makes a collector stop all that it runs, the extension among it, and start again in the same
// process with what its file says now.
func collectorReloads(s *stage) {
	s.startServer()
	c := s.settledCollector()

	c.config.Environment = "production"
	s.reload(c)
	s.need("SIGHUP: the server shows what the collector runs now", c.started, collectorStartLimit, s.ready(c))
	d, err := s.server.detail(c)
	s.must("the collector's detail", err)
	s.check("its new effective configuration, secrets masked", effective(c, d))
	s.check("the health of every component", healthTree(d.Health))
	if s.via == webSocket {
		s.check("two connections, the newest open", s.rows(c, "", "agent_disconnect")())
	} else {
		s.check("its connection goes on", s.rows(c, "")())
	}
	s.check("one record", s.alone(c))
}

// collectorCrashes: kill -9 of the collector, and a new start.
func collectorCrashes(s *stage) {
	srv := s.startServer()
	c := s.settledCollector()

	c.kill()
	killed := time.Now()
	reason := "connection_lost"
	if s.via == webSocket {
		s.need("kill -9: offline at once, connection_lost", killed, endLimit, srv.offline(c, reason))
	} else {
		reason = "heartbeat_timeout"
		s.need("kill -9: offline by its deadline, heartbeat_timeout", killed, pollerSilentLimit, srv.offline(c, reason))
		s.check("the row ends with the last poll, disconnected_by says when that was known",
			endedUnseen(s.newest(c), killed.Add(-2*collectorPolls-slack), killed.Add(slack)))
	}
	s.start(c)
	s.need("the collector is online and healthy again", c.started, collectorStartLimit, s.ready(c))
	s.check("two connections, the newest open", s.rows(c, "", reason)())
	s.check("one record", s.alone(c))
}

// collectorFallsSilent: SIGSTOP and SIGCONT.
func collectorFallsSilent(s *stage) {
	srv := s.startServer()
	c := s.settledCollector()
	if s.via == plainHTTP {
		// A collector sends a handful of reports while it starts; its pace is known after some polls.
		s.holds("it polls", 5*collectorPolls, srv.online(c))
	}

	s.must("SIGSTOP", c.signal(syscall.SIGSTOP))
	stopped := time.Now()
	limit := heartbeatTimeout + time.Second
	if s.via == plainHTTP {
		limit = pollerSilentLimit
	}
	s.need("SIGSTOP: offline by its deadline, heartbeat_timeout", stopped, limit, srv.offline(c, "heartbeat_timeout"))
	s.check("the row ends with the last sign of life, judged a whole time-out later",
		endedUnseen(s.newest(c), stopped.Add(-heartbeatTimeout), stopped.Add(slack)))

	s.must("SIGCONT", c.signal(syscall.SIGCONT))
	s.need("SIGCONT: it returns", time.Now(), returnLimit, srv.online(c))
	s.check("two connections, the newest open", s.rows(c, "", "heartbeat_timeout")())
	s.check("what was known of it still is", s.ready(c)())
	s.check("one record", s.alone(c))
}

// collectorOutlives: the server ends and starts again. A collector whose server asks it to wait, or that backs off by
// itself, may stay away for a minute.
func collectorOutlives(s *stage, signal syscall.Signal, reason string) {
	srv := s.startPatientServer(patientTimeout)
	c := s.settledCollector()

	before := s.newest(c)
	err := srv.end(signal, drain+5*time.Second)
	ended := time.Now()
	if signal == syscall.SIGKILL {
		err = nil // its exit says "killed", of course
	}
	s.check("the server ends", err)
	s.run()
	ready := time.Now()
	s.need("the collector returns by itself", ready, returnLimit, func() error {
		d, err := srv.detail(c)
		if err == nil && !d.LastSeenAt.After(ended) {
			err = fmt.Errorf("last seen at %v", d.LastSeenAt)
		}
		return errors.Join(err, srv.online(c)())
	})
	back := time.Now()
	// A poller's row belongs to no process: a crash does not end it, and it is closed at a stop because pollers are sent away.
	rows := []string{"", reason}
	if s.via == plainHTTP && signal == syscall.SIGKILL {
		rows = rows[:1]
	}
	s.check("the history has no gap", errors.Join(s.rows(c, rows...)(), s.historyOver(c, before, back.Sub(ended), reason)))
	s.check("nobody was called offline", s.neverOffline(c, ready, back))

	d, err := srv.detail(c)
	if err == nil {
		err = errors.Join(s.ready(c)(), effective(c, d), healthTree(d.Health))
	}
	s.check("what was known of it still is", err)
	s.check("one record", s.alone(c))
}

// collectorMeetsAmnesia: a collector that continues meets a server that knows nothing, and tells everything once more.
func collectorMeetsAmnesia(s *stage) {
	srv := s.startServer()
	c := s.settledCollector()

	_ = srv.end(syscall.SIGKILL, 5*time.Second) // an orderly stop would ask pollers to stay away for up to a minute
	s.must("its database goes", srv.forget())
	s.run()
	s.need("the collector tells a server without memory everything again", time.Now(), returnLimit, func() error {
		d, err := srv.detail(c)
		if err != nil {
			return err
		}
		if d.Health == nil {
			return errors.New("no health")
		}
		return errors.Join(s.ready(c)(), effective(c, d), healthTree(d.Health))
	})
	s.check("one record", s.alone(c))
}

// collectorShowsToken: a wrong token, mended and reloaded.
func collectorShowsToken(s *stage) {
	srv := s.startServer()
	c := s.configureCollector()
	c.config.Token = "not-the-token"
	s.start(c)

	s.refused(c)
	s.check("401: it runs on", c.alive())
	_, err := srv.status(c)
	if unknown := new(refusal); errors.As(err, &unknown) && unknown.status == http.StatusNotFound {
		err = nil
	} else {
		err = fmt.Errorf("REST knows the agent, or something else is wrong: %v", err)
	}
	everyone, listed := srv.everyone()
	if listed == nil && len(everyone) > 0 {
		listed = fmt.Errorf("the records are %v", everyone)
	}
	s.check("401: no trace of the agent", errors.Join(err, listed))

	c.config.Token = agentsToken
	s.reload(c)
	s.need("the right token and SIGHUP: online and healthy", c.started, collectorStartLimit, s.ready(c))
	s.check("one connection, open", s.rows(c, "")())
	s.check("one record", s.alone(c))
}

// refused waits until a collector has been refused twice. It tries again for ever: over WebSocket with growing pauses, over
// plain HTTP at its next poll.
func (s *stage) refused(c *collector) {
	why := []string{"error", "Server responded with status=401 Unauthorized"}
	if s.via == plainHTTP {
		why = []string{"error", "invalid response from server: 401"}
	}
	s.need("401: the collector logs why", c.started, collectorStartLimit, c.logged(0, why...))
	first := c.mark()
	s.need("401: it tries again", time.Now(), collectorStartLimit, c.logged(first, why...))
}

// collectorIsLetInLater: the server learns the right token while the collector knocks. Over plain HTTP the reports that were
// refused are gone for good: the first that is let in has nothing but uid, number and capabilities.
func collectorIsLetInLater(s *stage) {
	srv := s.startServer()
	c := s.configureCollector()
	c.config.Token = "the-token-of-tomorrow"
	s.start(c)
	s.refused(c)

	s.must("the server ends", srv.end(syscall.SIGTERM, drain+5*time.Second))
	srv.token = c.config.Token
	s.run()
	s.need("let in by the new token: online and healthy", time.Now(), returnLimit, s.ready(c))
	d, err := srv.detail(c)
	if err == nil {
		err = errors.Join(effective(c, d), healthTree(d.Health), inventory(d))
	}
	s.check("all of it is known", err)
	s.check("one connection, open", s.rows(c, "")())
	s.check("one record", s.alone(c))
}
