package main

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"

	"github.com/google/uuid"
	"github.com/gorilla/websocket"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/open-telemetry/opamp-go/protobufs"

	"opamp-server/tests/peers/internal/event"
)

// The library acts on flags and capabilities itself and shows neither to its callbacks. The tap therefore reads along
// on the library's own sockets: nothing stands between agent and server, so that ends and resets stay what they are.
// Parsing happens inside Read and Write: an event is out before the library acts on the bytes it tells of.

// installTap makes both of the library's clients dial through the tap. It must run before a client is made.
func installTap(say func(event.Event)) error {
	dial := func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		return &tap{
			Conn: conn,
			in:   stream{say: say, message: sayMessage},
			out:  stream{say: say, message: sayReport, outgoing: true},
		}, nil
	}
	transport, ok := http.DefaultTransport.(*http.Transport)
	if !ok {
		return errors.New("the default HTTP transport cannot be tapped")
	}
	transport.DialContext = dial // cloned by the plain HTTP client
	websocket.DefaultDialer.NetDialContext = dial
	return nil
}

type tap struct {
	net.Conn
	in, out stream
}

func (t *tap) Read(p []byte) (int, error) {
	n, err := t.Conn.Read(p)
	t.in.feed(p[:n])
	return n, err
}

func (t *tap) Write(p []byte) (int, error) {
	t.out.feed(p)
	return t.Conn.Write(p)
}

// stream cuts one direction of a connection into messages: HTTP first, frames after an upgrade.
type stream struct {
	say      func(event.Event)
	message  func(say func(event.Event), body []byte) error
	outgoing bool

	buffer   []byte
	upgraded bool
	partial  []byte // frames of an unfinished WebSocket message
	broken   bool
}

var errIncomplete = errors.New("more bytes are needed")

func (s *stream) feed(data []byte) {
	if s.broken {
		return
	}
	s.buffer = append(s.buffer, data...)
	for len(s.buffer) > 0 {
		used, err := s.next()
		if errors.Is(err, errIncomplete) {
			return
		}
		if err != nil {
			s.broken = true
			s.say(event.Event{Event: event.Garbled, Error: err.Error()})
			return
		}
		s.buffer = s.buffer[used:]
	}
}

func (s *stream) next() (int, error) {
	switch {
	case s.upgraded:
		return s.frame()
	case s.outgoing:
		return s.request()
	default:
		return s.response()
	}
}

func (s *stream) request() (int, error) {
	raw, lines := s.reader()
	request, err := http.ReadRequest(lines)
	if err != nil {
		return 0, incomplete(err)
	}
	body, err := readBody(request.Body, request.Header)
	if err != nil {
		return 0, err
	}
	used := len(s.buffer) - raw.Len() - lines.Buffered()
	if request.Header.Get("Upgrade") != "" {
		s.upgraded = true
		return used, nil
	}
	return used, s.message(s.say, body)
}

func (s *stream) response() (int, error) {
	raw, lines := s.reader()
	response, err := http.ReadResponse(lines, nil)
	if err != nil {
		return 0, incomplete(err)
	}
	body, err := readBody(response.Body, response.Header)
	if err != nil {
		return 0, err
	}
	used := len(s.buffer) - raw.Len() - lines.Buffered()
	switch response.StatusCode {
	case http.StatusSwitchingProtocols:
		s.upgraded = true
		return used, nil
	case http.StatusOK:
		return used, s.message(s.say, body)
	default:
		s.say(event.Event{Event: event.Refused, Status: response.StatusCode, Body: string(body)})
		return used, nil
	}
}

func (s *stream) reader() (*bytes.Reader, *bufio.Reader) {
	raw := bytes.NewReader(s.buffer)
	return raw, bufio.NewReader(raw)
}

func readBody(body io.ReadCloser, header http.Header) ([]byte, error) {
	data, err := io.ReadAll(body)
	if err != nil {
		return nil, incomplete(err)
	}
	if header.Get("Content-Encoding") != "gzip" {
		return data, nil
	}
	unzip, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	return io.ReadAll(unzip)
}

func incomplete(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errIncomplete
	}
	return err
}

// frame reads one WebSocket frame (RFC 6455, section 5.2); the library offers no compression.
func (s *stream) frame() (int, error) {
	if len(s.buffer) < 2 {
		return 0, errIncomplete
	}
	final, opcode := s.buffer[0]&0x80 != 0, int(s.buffer[0]&0x0f)
	masked, size := s.buffer[1]&0x80 != 0, uint64(s.buffer[1]&0x7f)
	used := 2
	if extra := map[uint64]int{126: 2, 127: 8}[size]; extra > 0 {
		if len(s.buffer) < used+extra {
			return 0, errIncomplete
		}
		var wide [8]byte
		copy(wide[8-extra:], s.buffer[used:used+extra])
		size = binary.BigEndian.Uint64(wide[:])
		used += extra
	}
	var key []byte
	if masked {
		if len(s.buffer) < used+4 {
			return 0, errIncomplete
		}
		key = s.buffer[used : used+4]
		used += 4
	}
	if uint64(len(s.buffer)-used) < size {
		return 0, errIncomplete
	}
	payload := bytes.Clone(s.buffer[used : used+int(size)])
	for i := range payload {
		if masked {
			payload[i] ^= key[i%4]
		}
	}
	used += int(size)

	switch opcode {
	case websocket.CloseMessage:
		if !s.outgoing {
			s.sayClose(payload)
		}
		return used, nil
	case websocket.PingMessage, websocket.PongMessage:
		return used, nil
	}
	s.partial = append(s.partial, payload...)
	if !final {
		return used, nil
	}
	whole := s.partial
	s.partial = nil
	header, length := protowire.ConsumeVarint(whole)
	if length < 0 || header != 0 {
		return 0, fmt.Errorf("a WebSocket message of %d bytes without the header 0", len(whole))
	}
	return used, s.message(s.say, whole[length:])
}

func (s *stream) sayClose(payload []byte) {
	closed := event.Event{Event: event.Close, Code: websocket.CloseNoStatusReceived}
	if len(payload) >= 2 {
		closed.Code = int(binary.BigEndian.Uint16(payload))
		closed.Body = string(payload[2:])
	}
	s.say(closed)
}

func sayReport(say func(event.Event), body []byte) error {
	var report protobufs.AgentToServer
	if err := proto.Unmarshal(body, &report); err != nil {
		return fmt.Errorf("a report that cannot be decoded: %w", err)
	}
	number := report.GetSequenceNum()
	say(event.Event{
		Event:           event.Report,
		SequenceNum:     &number,
		AgentDisconnect: report.GetAgentDisconnect() != nil,
		Parts:           parts(&report),
	})
	return nil
}

func sayMessage(say func(event.Event), body []byte) error {
	var message protobufs.ServerToAgent
	if err := proto.Unmarshal(body, &message); err != nil {
		return fmt.Errorf("a message that cannot be decoded: %w", err)
	}
	flags, capabilities := message.GetFlags(), message.GetCapabilities()
	full := flags&uint64(protobufs.ServerToAgentFlags_ServerToAgentFlags_ReportFullState) != 0
	arrived := event.Event{
		Event:           event.Message,
		Flags:           &flags,
		ReportFullState: &full,
		Capabilities:    &capabilities,
		Parts:           parts(&message),
	}
	if bytes := message.GetAgentIdentification().GetNewInstanceUid(); len(bytes) > 0 {
		uid, err := uuid.FromBytes(bytes)
		if err != nil {
			return fmt.Errorf("a new instance uid of %d bytes", len(bytes))
		}
		arrived.NewUID = uid.String()
	}
	say(arrived)
	return nil
}

func parts(message proto.Message) []string {
	var names []string
	message.ProtoReflect().Range(func(field protoreflect.FieldDescriptor, _ protoreflect.Value) bool {
		if field.Message() != nil {
			names = append(names, string(field.Name()))
		}
		return true
	})
	return names
}
