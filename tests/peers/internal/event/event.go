// Package event is what the agent program says about itself: one JSON object per line on its standard output.
package event

import "time"

// ClientModule is the module whose client is under test; the agent names the version it was linked with.
const ClientModule = "github.com/open-telemetry/opamp-go"

// Kinds of events. Those marked "wire" were read from the bytes of the connection itself, the others come from the library.
const (
	Build         = "build"          // first event of every agent: the library it was built with
	Connected     = "connected"      // WebSocket: every handshake; plain HTTP: the first answer, and the first after a failure
	ConnectFailed = "connect_failed" // the library could not connect, or was refused
	ErrorResponse = "error_response" // the server answered a report with an error
	LogError      = "log_error"      // the library logged an error
	Stopped       = "stopped"        // an orderly stop is complete
	BadCommand    = "bad_command"    // a line on standard input that nobody understands

	Report  = "report"  // wire: an AgentToServer is about to be sent
	Message = "message" // wire: a ServerToAgent arrived
	Refused = "refused" // wire: an HTTP answer other than 200 and 101
	Close   = "close"   // wire: a WebSocket Close frame arrived
	Garbled = "garbled" // wire: bytes that cannot be understood
)

// Event is one line. Only the fields of its kind are set.
type Event struct {
	Event string    `json:"event"`
	At    time.Time `json:"at"`
	Error string    `json:"error,omitempty"`

	Module   string `json:"module,omitempty"`
	Version  string `json:"version,omitempty"`
	Sum      string `json:"sum,omitempty"`
	Replaced *bool  `json:"replaced,omitempty"`

	SequenceNum     *uint64  `json:"sequence_num,omitempty"`
	AgentDisconnect bool     `json:"agent_disconnect,omitempty"`
	Parts           []string `json:"parts,omitempty"` // names of the sub-messages that were present

	Flags           *uint64 `json:"flags,omitempty"`
	ReportFullState *bool   `json:"report_full_state,omitempty"`
	Capabilities    *uint64 `json:"capabilities,omitempty"`
	NewUID          string  `json:"new_uid,omitempty"`

	Status int    `json:"status,omitempty"`
	Code   int    `json:"code,omitempty"`
	Body   string `json:"body,omitempty"`
}
