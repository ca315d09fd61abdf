// Command agent is one real agent: the reference client, steered by lines on standard input, telling what happens to it
// by JSON lines on standard output (package event).
//
//	health true|false ["last error"]    describe KEY VALUE    config TEXT    custom CAP,CAP    stop
//
// TEXT and VALUE may be quoted as in Go, so that one line can carry many. The end of standard input is the end of the
// agent, without any goodbye.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/open-telemetry/opamp-go/client"
	"github.com/open-telemetry/opamp-go/client/types"
	"github.com/open-telemetry/opamp-go/protobufs"

	"opamp-server/tests/peers/internal/event"
)

const stopTimeout = 10 * time.Second

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "agent:", err)
		os.Exit(1)
	}
}

type settings struct {
	server    string
	uid       string
	name      string
	token     string
	healthy   bool
	heartbeat time.Duration
}

func run() error {
	var s settings
	var buildOnly bool
	flag.StringVar(&s.server, "server", "", "the server's `URL`; ws: takes WebSocket, http: plain HTTP")
	flag.StringVar(&s.uid, "uid", "", "instance uid, as `UUID`")
	flag.StringVar(&s.name, "name", "agent", "service.name")
	flag.StringVar(&s.token, "token", "", "sent as Authorization: Bearer")
	flag.BoolVar(&s.healthy, "healthy", true, "health at the start")
	flag.DurationVar(&s.heartbeat, "heartbeat", time.Second, "pace of heartbeats or polls; 0 sends no heartbeats (WebSocket)")
	flag.BoolVar(&buildOnly, "build-info", false, "tell the build and end")
	flag.Parse()

	out := &voice{lines: json.NewEncoder(os.Stdout)}
	built, err := buildEvent()
	if err != nil {
		return err
	}
	out.say(built)
	if buildOnly {
		return nil
	}
	if err := installTap(out.say); err != nil {
		return err
	}
	a, err := newAgent(s, out)
	if err != nil {
		return err
	}
	if err := a.start(s); err != nil {
		return err
	}
	return a.obey()
}

// buildEvent tells which library this very binary was linked with.
func buildEvent() (event.Event, error) {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return event.Event{}, errors.New("this binary carries no build information")
	}
	at := slices.IndexFunc(info.Deps, func(m *debug.Module) bool { return m.Path == event.ClientModule })
	if at < 0 {
		return event.Event{}, fmt.Errorf("this binary was built without %s", event.ClientModule)
	}
	module := info.Deps[at]
	replaced := module.Replace != nil
	return event.Event{
		Event:    event.Build,
		Module:   module.Path,
		Version:  module.Version,
		Sum:      module.Sum,
		Replaced: &replaced,
	}, nil
}

// voice writes events, one line each, in the order of their moments.
type voice struct {
	mutex sync.Mutex
	lines *json.Encoder
}

func (v *voice) say(e event.Event) {
	v.mutex.Lock()
	defer v.mutex.Unlock()
	e.At = time.Now().UTC()
	if err := v.lines.Encode(e); err != nil {
		os.Exit(3) // nobody listens any more
	}
}

// Errorf and Debugf make the voice the library's logger: what it tells no callback, it at least logs.
func (v *voice) Errorf(_ context.Context, format string, args ...any) {
	v.say(event.Event{Event: event.LogError, Error: fmt.Sprintf(format, args...)})
}

func (v *voice) Debugf(context.Context, string, ...any) {}

type agent struct {
	client    client.OpAMPClient
	uid       uuid.UUID
	out       *voice
	polls     bool
	connected atomic.Bool

	identifying    map[string]string
	nonIdentifying map[string]string
	startedAt      time.Time

	mutex  sync.Mutex
	config string
}

func newAgent(s settings, out *voice) (*agent, error) {
	uid, err := uuid.Parse(s.uid)
	if err != nil {
		return nil, fmt.Errorf("--uid: %w", err)
	}
	target, err := url.Parse(s.server)
	if err != nil {
		return nil, fmt.Errorf("--server: %w", err)
	}
	a := &agent{
		uid:            uid,
		out:            out,
		startedAt:      time.Now(),
		config:         "service: {}\n",
		identifying:    map[string]string{"service.name": s.name, "service.instance.id": uid.String()},
		nonIdentifying: map[string]string{"os.type": "linux"},
	}
	switch target.Scheme {
	case "ws":
		a.client = client.NewWebSocket(out)
	case "http":
		a.client = client.NewHTTP(out)
		a.polls = true
	default:
		return nil, fmt.Errorf("--server: %q is neither ws: nor http:", s.server)
	}
	return a, nil
}

func (a *agent) start(s settings) error {
	if err := a.client.SetAgentDescription(a.description()); err != nil {
		return err
	}
	if err := a.client.SetHealth(a.health(s.healthy, "")); err != nil {
		return err
	}
	capabilities := protobufs.AgentCapabilities_AgentCapabilities_ReportsStatus |
		protobufs.AgentCapabilities_AgentCapabilities_ReportsEffectiveConfig |
		protobufs.AgentCapabilities_AgentCapabilities_ReportsHealth |
		protobufs.AgentCapabilities_AgentCapabilities_ReportsHeartbeat
	if err := a.client.SetCapabilities(&capabilities); err != nil {
		return err
	}
	header := http.Header{}
	if s.token != "" {
		header.Set("Authorization", "Bearer "+s.token)
	}
	return a.client.Start(context.Background(), types.StartSettings{
		OpAMPServerURL:    s.server,
		Header:            header,
		InstanceUid:       types.InstanceUid(a.uid),
		HeartbeatInterval: &s.heartbeat, // the polling interval of plain HTTP, too
		Callbacks: types.Callbacks{
			OnConnect: func(context.Context) {
				if a.polls && a.connected.Swap(true) {
					return // plain HTTP calls this for every answer
				}
				a.out.say(event.Event{Event: event.Connected})
			},
			OnConnectFailed: func(_ context.Context, err error) {
				a.connected.Store(false)
				a.out.say(event.Event{Event: event.ConnectFailed, Error: err.Error()})
			},
			OnError: func(_ context.Context, err *protobufs.ServerErrorResponse) {
				a.out.say(event.Event{Event: event.ErrorResponse, Error: err.GetType().String() + ": " + err.GetErrorMessage()})
			},
			GetEffectiveConfig: func(context.Context) (*protobufs.EffectiveConfig, error) {
				return a.effectiveConfig(), nil
			},
		},
	})
}

func (a *agent) obey() error {
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		word, rest, _ := strings.Cut(strings.TrimSpace(lines.Text()), " ")
		if word == "stop" {
			return a.stop()
		}
		if err := a.do(word, strings.TrimSpace(rest)); err != nil {
			a.out.say(event.Event{Event: event.BadCommand, Error: err.Error()})
		}
	}
	return errors.Join(errors.New("standard input ended"), lines.Err())
}

func (a *agent) do(word, rest string) error {
	switch word {
	case "health":
		first, text, _ := strings.Cut(rest, " ")
		healthy, err := strconv.ParseBool(first)
		if err != nil {
			return err
		}
		return a.client.SetHealth(a.health(healthy, unquote(text)))
	case "describe":
		key, value, found := strings.Cut(rest, " ")
		if !found {
			return errors.New("describe KEY VALUE")
		}
		a.nonIdentifying[key] = unquote(value)
		return a.client.SetAgentDescription(a.description())
	case "config":
		a.mutex.Lock()
		a.config = unquote(rest)
		a.mutex.Unlock()
		return a.client.UpdateEffectiveConfig(context.Background())
	case "custom":
		return a.client.SetCustomCapabilities(&protobufs.CustomCapabilities{Capabilities: strings.Split(rest, ",")})
	default:
		return fmt.Errorf("no such command: %q", word)
	}
}

func (a *agent) stop() error {
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	if err := a.client.Stop(ctx); err != nil {
		return err
	}
	a.out.say(event.Event{Event: event.Stopped})
	return nil
}

func (a *agent) description() *protobufs.AgentDescription {
	return &protobufs.AgentDescription{
		IdentifyingAttributes:    attributes(a.identifying),
		NonIdentifyingAttributes: attributes(a.nonIdentifying),
	}
}

func (a *agent) health(healthy bool, lastError string) *protobufs.ComponentHealth {
	status := "running"
	if !healthy {
		status = "degraded"
	}
	return &protobufs.ComponentHealth{
		Healthy:            healthy,
		LastError:          lastError,
		Status:             status,
		StartTimeUnixNano:  uint64(a.startedAt.UnixNano()),
		StatusTimeUnixNano: uint64(time.Now().UnixNano()),
	}
}

func (a *agent) effectiveConfig() *protobufs.EffectiveConfig {
	a.mutex.Lock()
	defer a.mutex.Unlock()
	return &protobufs.EffectiveConfig{ConfigMap: &protobufs.AgentConfigMap{
		ConfigMap: map[string]*protobufs.AgentConfigFile{
			"collector.yaml": {Body: []byte(a.config), ContentType: "text/yaml"},
		},
	}}
}

func attributes(values map[string]string) []*protobufs.KeyValue {
	pairs := make([]*protobufs.KeyValue, 0, len(values))
	for key, value := range values {
		pairs = append(pairs, &protobufs.KeyValue{
			Key:   key,
			Value: &protobufs.AnyValue{Value: &protobufs.AnyValue_StringValue{StringValue: value}},
		})
	}
	slices.SortFunc(pairs, func(a, b *protobufs.KeyValue) int { return strings.Compare(a.Key, b.Key) })
	return pairs
}

func unquote(text string) string {
	if plain, err := strconv.Unquote(text); err == nil {
		return plain
	}
	return text
}
