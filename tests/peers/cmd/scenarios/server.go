package main

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// The server's clockwork in every scenario; the deadlines of the checks follow from it.
const (
	heartbeatInterval = time.Second
	heartbeatTimeout  = 3 * time.Second
	flushInterval     = time.Second
	drain             = 2 * time.Second

	readyLimit  = 15 * time.Second
	agentsToken = "peers-agents-token"
)

type server struct {
	binary    string
	database  string
	log       string
	token     string        // agents.token
	timeout   time.Duration // heartbeat.timeout
	agents    string        // address of the agents' listener
	operators string        // address of the REST listener
	api       *http.Client

	process *exec.Cmd
	exited  chan struct{} // closed at the exit
	outcome error         // of the exit
}

// startServer puts a server with an empty database on the stage and waits until it is ready.
func (s *stage) startServer() *server { return s.startPatientServer(heartbeatTimeout) }

// startPatientServer is startServer with another heartbeat.timeout.
func (s *stage) startPatientServer(timeout time.Duration) *server {
	agents, err := freeAddress()
	s.must("a free port", err)
	operators, err := freeAddress()
	s.must("a free port", err)
	s.server = &server{
		binary:    s.programs.server,
		database:  filepath.Join(s.dir, "opamp-server.db"),
		log:       filepath.Join(s.dir, "server.log"),
		token:     agentsToken,
		timeout:   timeout,
		agents:    agents,
		operators: operators,
		api:       &http.Client{Timeout: 5 * time.Second},
	}
	s.run()
	return s.server
}

// run starts the process, again after an end, and returns once it is ready.
func (s *stage) run() {
	s.must("the server starts", s.server.launch())
	_, err := s.until(time.Now(), readyLimit, func() error {
		select {
		case <-s.server.exited:
			return nil // no use in waiting on
		default:
			return s.server.ready()
		}
	})
	if err == nil {
		err = s.server.ready()
	}
	s.must("the server is ready", err)
}

func (s *server) launch() error {
	log, err := os.OpenFile(s.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	s.process = exec.Command(s.binary)
	s.process.Dir = filepath.Dir(s.database)
	s.process.Stdout, s.process.Stderr = log, log
	s.process.Env = []string{
		"PATH=" + os.Getenv("PATH"),
		"OPAMP_AGENTS_LISTEN=" + s.agents,
		"OPAMP_AGENTS_TOKEN=" + s.token,
		"OPAMP_OPERATORS_LISTEN=" + s.operators,
		"OPAMP_STORE_URL=sqlite://" + s.database,
		"OPAMP_STORE_FLUSH_INTERVAL=" + flushInterval.String(),
		"OPAMP_HEARTBEAT_INTERVAL=" + heartbeatInterval.String(),
		"OPAMP_HEARTBEAT_TIMEOUT=" + s.timeout.String(),
		"OPAMP_SHUTDOWN_DRAIN=" + drain.String(),
	}
	if err := s.process.Start(); err != nil {
		return err
	}
	process, exited := s.process, make(chan struct{})
	s.exited = exited
	go func() {
		s.outcome = process.Wait()
		close(exited)
	}()
	return nil
}

func (s *server) ready() error {
	answer, err := s.api.Get("http://" + s.operators + "/readyz")
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("/readyz answers %s", answer.Status)
	}
	return nil
}

// end sends the signal and waits for the exit.
func (s *server) end(signal syscall.Signal, limit time.Duration) error {
	if err := s.process.Process.Signal(signal); err != nil {
		return err
	}
	select {
	case <-s.exited:
		return s.outcome
	case <-time.After(limit):
		return fmt.Errorf("still running %v after %v", limit, signal)
	}
}

// forget removes the database of a server that has ended.
func (s *server) forget() error {
	for _, suffix := range []string{"", "-wal", "-shm", ".lock"} {
		if err := os.Remove(s.database + suffix); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

func (s *server) kill() {
	if s.process != nil && s.process.Process != nil {
		_ = s.process.Process.Kill()
		<-s.exited
	}
}

func (s *server) logTail(lines int) string {
	if s == nil {
		return ""
	}
	text, err := os.ReadFile(s.log)
	if err != nil {
		return err.Error()
	}
	return lastLines(string(text), lines)
}

func (s *server) url(scheme string) string {
	return scheme + "://" + s.agents + "/v1/opamp"
}

var given sync.Map // addresses that freeAddress has given out

// freeAddress never gives the same address twice: its first owner may be between two lives of its server.
func freeAddress() (string, error) {
	for {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return "", err
		}
		address := listener.Addr().String()
		_ = listener.Close()
		if _, taken := given.LoadOrStore(address, true); !taken {
			return address, nil
		}
	}
}

func lastLines(text string, count int) string {
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-count):], "\n")
}
