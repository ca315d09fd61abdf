// Command bare is a server of the reference library with as little behind it as a server can have: one record per agent,
// in memory. scripts/bench measures it beside ours.
//
//	bare ADDRESS        listens there, path /v1/opamp, until SIGTERM or SIGINT
package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/open-telemetry/opamp-go/protobufs"
	"github.com/open-telemetry/opamp-go/server"
	"github.com/open-telemetry/opamp-go/server/types"
)

const stopTimeout = 10 * time.Second

// record is what is known of an agent: the newest of everything it reports.
type record struct {
	sequence     uint64
	capabilities uint64
	description  *protobufs.AgentDescription
	health       *protobufs.ComponentHealth
	config       *protobufs.EffectiveConfig
	seen         time.Time
}

type fleet struct {
	mutex  sync.Mutex
	agents map[string]*record
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "bare:", err)
		os.Exit(1)
	}
}

func run() error {
	if len(os.Args) != 2 {
		return errors.New("the address to listen on is the one argument")
	}
	known := &fleet{agents: make(map[string]*record)}
	opamp := server.New(nil)
	settings := server.StartSettings{
		ListenEndpoint: os.Args[1],
		Settings: server.Settings{
			// Takes packed bodies of plain HTTP; on WebSockets the swarm does not ask for it.
			EnableCompression: true,
			Callbacks: types.Callbacks{OnConnecting: func(*http.Request) types.ConnectionResponse {
				return types.ConnectionResponse{
					Accept:              true,
					ConnectionCallbacks: types.ConnectionCallbacks{OnMessage: known.answer},
				}
			}},
		},
	}
	if err := opamp.Start(settings); err != nil {
		return err
	}
	end, release := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer release()
	<-end.Done()
	limited, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	return opamp.Stop(limited)
}

// answer notes what the report says and asks for everything where its number does not continue the last one.
func (f *fleet) answer(_ context.Context, _ types.Connection, report *protobufs.AgentToServer) *protobufs.ServerToAgent {
	answer := &protobufs.ServerToAgent{
		InstanceUid: report.InstanceUid,
		Capabilities: uint64(protobufs.ServerCapabilities_ServerCapabilities_AcceptsStatus |
			protobufs.ServerCapabilities_ServerCapabilities_AcceptsEffectiveConfig),
	}
	f.mutex.Lock()
	defer f.mutex.Unlock()
	agent := f.agents[string(report.InstanceUid)]
	if agent == nil {
		agent = &record{}
		f.agents[string(report.InstanceUid)] = agent
	} else if report.SequenceNum != agent.sequence+1 && report.AgentDescription == nil {
		answer.Flags = uint64(protobufs.ServerToAgentFlags_ServerToAgentFlags_ReportFullState)
	}
	agent.sequence = report.SequenceNum
	agent.capabilities = report.Capabilities
	agent.seen = time.Now()
	if report.AgentDescription != nil {
		agent.description = report.AgentDescription
	}
	if report.Health != nil {
		agent.health = report.Health
	}
	if report.EffectiveConfig != nil {
		agent.config = report.EffectiveConfig
	}
	return answer
}
