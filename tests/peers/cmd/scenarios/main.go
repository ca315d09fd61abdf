// Command scenarios runs the reference client (cmd/agent) and an OpenTelemetry Collector (../collector) against the server's
// own binary and asks the REST API what the server made of it. Every scenario has its own server, database and agent; every
// check is a condition with a deadline.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"regexp"
	"sync"
	"syscall"

	"opamp-server/tests/peers/internal/event"
)

type programs struct {
	server, agent string
	collector     string // empty: this machine cannot build it
	version, sum  string // of the library, as go.mod and go.sum have it
}

func main() {
	var p programs
	var only string
	flag.StringVar(&p.server, "server", "", "the server's binary, by `path`")
	flag.StringVar(&p.agent, "agent", "", "the agent's binary, by `path`")
	flag.StringVar(&p.collector, "collector", "", "the OpenTelemetry Collector's binary, by `path`; without it, its scenarios are left out")
	flag.StringVar(&p.version, "version", "", "the library's version that the agent must have")
	flag.StringVar(&p.sum, "sum", "", "the library's checksum that the agent must have")
	flag.StringVar(&only, "only", "", "run only the scenarios that match this `regexp` (\"transport/name\")")
	flag.Parse()

	wanted, err := regexp.Compile(only)
	if err != nil || p.server == "" || p.agent == "" {
		fmt.Fprintln(os.Stderr, "scenarios: --server and --agent are needed, --only must be a regular expression")
		os.Exit(2)
	}

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	var t tally
	t.check("build", "the agent is linked with the released library", checkBuild(p), p.version+" "+p.sum)
	perform := func(via transport, all []scenario) {
		for _, s := range all {
			name := via.scheme + "/" + s.name
			if ctx.Err() != nil || !wanted.MatchString(name) || (s.webSocketOnly && via != webSocket) {
				continue
			}
			play(ctx, &t, p, via, s)
		}
	}
	for _, via := range []transport{webSocket, plainHTTP} {
		perform(via, scenarios)
	}
	if p.collector != "" {
		// A collector mostly waits, so both transports go side by side; what it must do within a time leaves room for that.
		var both sync.WaitGroup
		for _, via := range []transport{webSocket, plainHTTP} {
			both.Add(1)
			go func() {
				defer both.Done()
				perform(via, collectorScenarios)
			}()
		}
		both.Wait()
	}
	if ctx.Err() != nil {
		t.check("run", "not interrupted", errors.New("a signal ended it"), "")
	}

	fmt.Printf("peers: %d passed, %d failed\n", t.passed, t.failed)
	if p.collector == "" {
		fmt.Println("peers: the collector's scenarios were SKIPPED, there was no collector")
	}
	if t.failed > 0 || t.passed == 0 {
		os.Exit(1)
	}
}

// checkBuild asks the binary itself, whatever go.mod says.
func checkBuild(p programs) error {
	output, err := exec.Command(p.agent, "--build-info").Output()
	if err != nil {
		return err
	}
	var built event.Event
	if err := json.Unmarshal(output, &built); err != nil {
		return err
	}
	switch {
	case built.Event != event.Build || built.Module != event.ClientModule:
		return fmt.Errorf("it says %s", output)
	case built.Replaced == nil || *built.Replaced:
		return errors.New("the library is replaced")
	case built.Sum == "":
		return errors.New("the library has no checksum: it is no downloaded module")
	case p.version != "" && built.Version != p.version, p.sum != "" && built.Sum != p.sum:
		return fmt.Errorf("it has %s %s", built.Version, built.Sum)
	}
	return nil
}

// tally prints a line per check and counts.
type tally struct {
	mutex          sync.Mutex // and for whoever else prints
	passed, failed int
}

func (t *tally) check(group, name string, err error, detail string) bool {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	if err != nil {
		t.failed++
		fmt.Printf("FAIL  %s: %s: %v\n", group, name, err)
		return false
	}
	t.passed++
	if detail != "" {
		detail = " (" + detail + ")"
	}
	fmt.Printf("ok  %s: %s%s\n", group, name, detail)
	return true
}
