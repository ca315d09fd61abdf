package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"
)

// What the REST API says, as far as the checks look at it.

type agentStatus struct {
	AgentID          string          `json:"agent_id"`
	Status           string          `json:"status"`
	Connected        bool            `json:"connected"`
	Healthy          *bool           `json:"healthy"`
	DisconnectReason *string         `json:"disconnect_reason"`
	ActiveConnection json.RawMessage `json:"active_connection"`
}

type agentDetail struct {
	ID          string    `json:"id"`
	Name        string    `json:"name"`
	Status      string    `json:"status"`
	Connected   bool      `json:"connected"`
	Healthy     *bool     `json:"healthy"`
	LastSeenAt  time.Time `json:"last_seen_at"`
	Description struct {
		Identifying    map[string]any `json:"identifying_attributes"`
		NonIdentifying map[string]any `json:"non_identifying_attributes"`
	} `json:"description"`
	Health          *componentHealth `json:"health"`
	EffectiveConfig map[string]struct {
		Body        string `json:"body"`
		ContentType string `json:"content_type"`
	} `json:"effective_config"`
	CustomCapabilities  []string                    `json:"custom_capabilities"`
	Capabilities        []string                    `json:"capabilities"`
	ComponentsHash      string                      `json:"components_hash"`
	AvailableComponents map[string]componentDetails `json:"available_components"`

	raw string
}

type componentHealth struct {
	Healthy   bool                       `json:"healthy"`
	Status    string                     `json:"status"`
	LastError string                     `json:"last_error"`
	At        time.Time                  `json:"status_time"`
	Parts     map[string]componentHealth `json:"component_health_map"`
}

type componentDetails struct {
	Metadata map[string]any              `json:"metadata"`
	Parts    map[string]componentDetails `json:"sub_component_map"`
}

type connection struct {
	ID               json.Number `json:"id"`
	ConnectedAt      time.Time   `json:"connected_at"`
	DisconnectedAt   *time.Time  `json:"disconnected_at"`
	DisconnectedBy   *time.Time  `json:"disconnected_by"`
	DurationSeconds  *int64      `json:"duration_seconds"`
	DisconnectReason *string     `json:"disconnect_reason"`
	RemoteAddr       *string     `json:"remote_addr"`
	Transport        string      `json:"transport"`
}

func (c connection) open() bool { return c.DisconnectedAt == nil }

func (c connection) reason() string { return text(c.DisconnectReason) }

type transition struct {
	At     time.Time `json:"at"`
	From   *string   `json:"from"`
	To     string    `json:"to"`
	Reason *string   `json:"reason"`
}

func text(word *string) string {
	if word == nil {
		return "(none)"
	}
	return *word
}

// fetch reads one resource of an agent into value and returns the body as it came.
func (s *server) fetch(uid, resource string, value any) (string, error) {
	return s.get("/api/v1/agents/"+uid+resource, value)
}

func (s *server) get(path string, value any) (string, error) {
	answer, err := s.api.Get("http://" + s.operators + path)
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err != nil {
		return "", err
	}
	if answer.StatusCode != http.StatusOK {
		return "", &refusal{status: answer.StatusCode, body: string(body)}
	}
	if err := json.Unmarshal(body, value); err != nil {
		return "", fmt.Errorf("%w in %s", err, body)
	}
	return string(body), nil
}

type refusal struct {
	status int
	body   string
}

func (r *refusal) Error() string { return fmt.Sprintf("REST answers %d: %s", r.status, r.body) }

func (s *server) status(a agent) (agentStatus, error) {
	var status agentStatus
	_, err := s.fetch(a.instance(), "/status", &status)
	return status, err
}

func (s *server) detail(a agent) (agentDetail, error) {
	var detail agentDetail
	raw, err := s.fetch(a.instance(), "", &detail)
	detail.raw = raw
	return detail, err
}

// everyone lists the uids of all records there are.
func (s *server) everyone() ([]string, error) {
	var page struct {
		Agents []struct {
			ID string `json:"id"`
		} `json:"agents"`
		Total int `json:"total"`
	}
	if _, err := s.get("/api/v1/agents?include=retired", &page); err != nil {
		return nil, err
	}
	uids := make([]string, 0, len(page.Agents))
	for _, a := range page.Agents {
		uids = append(uids, a.ID)
	}
	if page.Total != len(uids) {
		return uids, fmt.Errorf("total is %d, records are %d", page.Total, len(uids))
	}
	return uids, nil
}

// history is the agent's connections, newest first; it fails if they contradict each other.
func (s *server) history(a agent) ([]connection, error) {
	var page struct {
		Connections []connection `json:"connections"`
		Total       int          `json:"total"`
	}
	if _, err := s.fetch(a.instance(), "/connection-history", &page); err != nil {
		return nil, err
	}
	if page.Total != len(page.Connections) {
		return nil, fmt.Errorf("total is %d, rows are %d", page.Total, len(page.Connections))
	}
	return page.Connections, consistent(page.Connections)
}

func consistent(rows []connection) error {
	for i, row := range rows {
		if i > 0 && row.open() {
			return fmt.Errorf("row %s is open beneath newer ones", row.ID)
		}
		if row.open() {
			continue
		}
		switch {
		case row.DisconnectedAt.Before(row.ConnectedAt):
			return fmt.Errorf("row %s ended before it began", row.ID)
		case row.DisconnectedBy != nil && row.DisconnectedBy.Before(*row.DisconnectedAt):
			return fmt.Errorf("row %s: disconnected_by lies before disconnected_at", row.ID)
		case row.DisconnectReason == nil:
			return fmt.Errorf("row %s ended without a reason", row.ID)
		case row.DurationSeconds == nil:
			return fmt.Errorf("row %s ended without duration_seconds", row.ID)
		}
		span := row.DisconnectedAt.Sub(row.ConnectedAt)
		if counted := time.Duration(*row.DurationSeconds) * time.Second; (span - counted).Abs() > time.Second {
			return fmt.Errorf("row %s: duration_seconds is %d, the row spans %v", row.ID, *row.DurationSeconds, span)
		}
		if i > 0 && row.DisconnectedAt.After(rows[i-1].ConnectedAt) {
			return fmt.Errorf("rows %s and %s overlap", row.ID, rows[i-1].ID)
		}
	}
	return nil
}

func (s *server) transitions(a agent) ([]transition, error) {
	var page struct {
		Transitions []transition `json:"transitions"`
	}
	_, err := s.fetch(a.instance(), "/status-history", &page)
	return page.Transitions, err
}

// online: the verdict and the observation agree that the agent is there.
func (s *server) online(a agent) func() error {
	return func() error {
		status, err := s.status(a)
		switch {
		case err != nil:
			return err
		case status.AgentID != a.instance():
			return fmt.Errorf("the status is that of %s", status.AgentID)
		case status.Status != "online" || !status.Connected:
			return fmt.Errorf("status %s, connected %t", status.Status, status.Connected)
		case len(status.ActiveConnection) == 0 || string(status.ActiveConnection) == "null":
			return errors.New("active_connection is missing")
		}
		return nil
	}
}

// offline: so says the status, with that reason, and the newest row is closed with it.
func (s *server) offline(a agent, reason string) func() error {
	return func() error {
		status, err := s.status(a)
		switch {
		case err != nil:
			return err
		case status.Status != "offline" || status.Connected:
			return fmt.Errorf("status %s, connected %t", status.Status, status.Connected)
		case text(status.DisconnectReason) != reason:
			return fmt.Errorf("disconnect_reason is %s, not %s", text(status.DisconnectReason), reason)
		}
		rows, err := s.history(a)
		switch {
		case err != nil:
			return err
		case len(rows) == 0 || rows[0].open():
			return errors.New("no closed row is the newest one")
		case rows[0].reason() != reason:
			return fmt.Errorf("the newest row says %s, not %s", rows[0].reason(), reason)
		}
		return nil
	}
}
