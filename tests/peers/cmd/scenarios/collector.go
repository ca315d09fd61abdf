package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"text/template"
	"time"

	"github.com/google/uuid"
)

// collector is a running OpenTelemetry Collector with the opamp extension (../../collector).
type collector struct {
	running
	config collectorConfig
	file   string
}

// collectorConfig fills the template below.
type collectorConfig struct {
	Transport   string // the extension's word: ws or http
	Endpoint    string
	Token       string
	UID         string
	Environment string
	Secrets     map[string]string // by where they stand
}

// What the collector must keep to itself. It blanks the values of its "opaque" settings, headers foremost, before it reports
// its effective configuration; a URL's user info and the attributes of its own telemetry leave it as they are.
var collectorSecrets = map[string]string{
	"url":       "hunter2-url",
	"header":    "hunter2-header",
	"attribute": "hunter2-attribute",
}

// The extension never states ReportsHeartbeat: over WebSocket it sends a heartbeat every 30 s that nothing can change, over
// plain HTTP it polls at its own pace, by default every 30 s too. It reports the resource attribute service.instance.id,
// which the collector invents at each start, and not its instance_uid: whoever wants them equal must set both.
var collectorTemplate = template.Must(template.New("collector.yaml").Option("missingkey=error").Parse(`
extensions:
  opamp:
    instance_uid: {{.UID}}
    server:
      {{.Transport}}:
        endpoint: {{.Endpoint}}
        headers:
          authorization: Bearer {{.Token}}
{{- if eq .Transport "http"}}
        polling_interval: 1s
{{- end}}
    agent_description:
      non_identifying_attributes:
        deployment.environment.name: {{.Environment}}
receivers:
  otlp:
    protocols:
      http:
        endpoint: 127.0.0.1:0
exporters:
  otlp_http:
    endpoint: http://carol:{{.Secrets.url}}@127.0.0.1:9/
    headers:
      x-api-key: {{.Secrets.header}}
service:
  extensions: [opamp]
  pipelines:
    traces:
      receivers: [otlp]
      exporters: [otlp_http]
  telemetry:
    logs:
      disable_stacktrace: true
    metrics:
      level: none
    resource:
      attributes:
        - name: service.instance.id
          value: {{.UID}}
        - name: vault.token
          value: {{.Secrets.attribute}}
`))

const (
	collectorName    = "collector" // both as builder.yaml has them
	collectorVersion = "0.158.0"
	collectorPolls   = time.Second
)

// configureCollector thinks of a collector that is let in.
func (s *stage) configureCollector() *collector {
	uid, err := uuid.NewV7()
	s.must("a uid", err)
	return &collector{
		running: running{uid: uid.String()},
		file:    filepath.Join(s.dir, "collector-"+uid.String()+".yaml"),
		config: collectorConfig{
			Transport:   s.via.scheme,
			Endpoint:    s.server.url(s.via.scheme),
			Token:       agentsToken,
			UID:         uid.String(),
			Environment: "staging",
			Secrets:     collectorSecrets,
		},
	}
}

// write puts the present configuration where the collector reads it at a start and at SIGHUP.
func (c *collector) write() error {
	file, err := os.Create(c.file)
	if err != nil {
		return err
	}
	return errors.Join(collectorTemplate.Execute(file, c.config), file.Close())
}

// start starts the collector, again after an end.
func (s *stage) start(c *collector) {
	s.must("the collector's configuration", c.write())
	c.exited, c.started = make(chan struct{}), time.Now()
	c.process = exec.Command(s.programs.collector, "--config", c.file)
	c.process.Stdout, c.process.Stderr = &c.running, &c.running
	c.process.Env = []string{"PATH=" + os.Getenv("PATH")}
	s.must("the collector starts", c.process.Start())
	if !slices.Contains(s.agents, &c.running) {
		s.agents = append(s.agents, &c.running)
	}
	process, exited := c.process, c.exited
	go func() {
		c.outcome = process.Wait()
		close(exited)
	}()
}

// reload makes the collector take its present configuration, in the same process.
func (s *stage) reload(c *collector) {
	s.must("the collector's configuration", c.write())
	c.started = time.Now()
	s.must("SIGHUP", c.signal(syscall.SIGHUP))
}

// mark is the place in the log from which a later look starts.
func (c *collector) mark() int {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	return c.lines.Len()
}

// logged answers whether one line of the log since the mark has all these words.
func (c *collector) logged(mark int, words ...string) func() error {
	return func() error {
		c.mutex.Lock()
		defer c.mutex.Unlock()
	lines:
		for line := range strings.Lines(c.lines.String()[mark:]) {
			for _, word := range words {
				if !strings.Contains(line, word) {
					continue lines
				}
			}
			return nil
		}
		return fmt.Errorf("no line with %q", words)
	}
}

func (c *collector) alive() error {
	select {
	case <-c.exited:
		return fmt.Errorf("the collector has ended: %v", c.outcome)
	default:
		return nil
	}
}
