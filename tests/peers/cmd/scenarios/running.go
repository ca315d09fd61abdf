package main

import (
	"bytes"
	"fmt"
	"os/exec"
	"sync"
	"syscall"
	"time"
)

// running is one running agent program, whatever is in it.
type running struct {
	uid     string
	started time.Time

	process *exec.Cmd
	exited  chan struct{} // closed at the exit
	outcome error         // of the exit

	mutex sync.Mutex
	lines bytes.Buffer // standard output and error as they came
}

// agent is whatever the REST API may know under an instance uid.
type agent interface {
	instance() string
}

func (p *running) instance() string { return p.uid }

// Write collects what the program says.
func (p *running) Write(data []byte) (int, error) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return p.lines.Write(data)
}

func (p *running) tail(count int) string {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return lastLines(p.lines.String(), count)
}

func (p *running) signal(signal syscall.Signal) error {
	return p.process.Process.Signal(signal)
}

// kill is kill -9: no goodbye, no Close frame; the kernel closes the sockets.
func (p *running) kill() {
	_ = p.process.Process.Kill()
	<-p.exited
}

func (p *running) awaitExit(limit time.Duration) error {
	select {
	case <-p.exited:
		return p.outcome
	case <-time.After(limit):
		return fmt.Errorf("the agent still runs after %v", limit)
	}
}
