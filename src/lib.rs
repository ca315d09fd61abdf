//! # opamp-server
//!
//! An OpAMP server that never lies about the fleet: who was connected, when, why it ended, and how
//! sure we are. Agents connect over WebSocket or plain HTTP; operators read through REST.
//!
//! ## How to read it
//!
//! [`agent`] (pure: what an agent is, what a report changes, what it is answered), then [`session`]
//! (one agent's conversation, without any socket), then `transport/websocket/` (one link, one
//! task), then [`server`] (everything is built there, once).
//!
//! ## A report's way
//!
//! A link reads a frame → [`wire`] decodes → [`session::exchange`]: the first report of an agent on
//! a link opens its session, and with it a row of the [`history`], durable before the first offer;
//! [`agent::report`] absorbs the report (pure); a report that changed state is saved before it is
//! answered, with that row where nothing was on record of the agent; a mere heartbeat writes one instant into the connection's [`pulse`] and nothing else →
//! [`agent::offer`] composes → the link sends.
//!
//! Openings, saves and ends that arrive during one commit share the next (`history`'s writer). Signs
//! of life reach the store folded, in one statement every few seconds ([`session::flush`]), and the
//! stored number never passes the stored state: a crash costs a full-state request, never a lie.
//!
//! A message holds a share of the memory for messages ([`burden`]) from its first bytes until it is
//! answered; a large one is unfolded aside, so that nobody else's link waits for it.
//!
//! ## An order's way
//!
//! A handler of [`api`] writes the order into the store, with the id of the connection it is for, and
//! is done. The store announces it in the same transaction; [`orders`] on every node looks for those
//! of its own connections and ends them through the history → the link sends Close once that is on
//! record. Wakes carry nothing and may get lost: the task looks at a pace as well.
//!
//! ## Threads
//!
//! Links live on [`lanes`], threads of their own, and stay where they were put; everything else shares the runtime of
//! `main`. Nothing depends on the thread that it runs on: a session asks the store from wherever it is. What waits on a
//! thread that is stuck is not seen, so that [`sight`] looks on all of them.
//!
//! ## Who decides what
//!
//! - [`heartbeat`] alone says that an agent fell silent; it holds a deadline per connection and
//!   re-arms lazily.
//! - [`safety`] compares open rows with what lives here, both ways, and mends what differs.
//! - [`sight`] knows when the server itself was blind; nobody is accused for such a time.
//! - [`store`] decides races: every write carries its connection's id, the fence, and changes nothing
//!   once a newer connection took over.
//! - [`lease`] holds this node's lease and alone says that another node is lost; [`peers`] is what it saw of them.
//! - [`anchor`] keeps the clock at the database's time.
//! - [`sweep`] carries out what time alone changes: return times that have passed, stale agents.
//!   [`retention`] alone forgets.
//! - [`incidents`] tells disconnects that belong together from noise, and by which cause (pure).
//! - [`timeline`] (pure) alone says what is known of a moment in the past: proven, watched, or unknown.
//! - [`close`] is the closed list of ends, with whose end it is; the status of an agent follows.
//!
//! ## Who may know whom
//!
//! From the bottom: `proto`, `clock`, `close`, `config`, `site`, `burden`, `lanes` know nothing of ours; `agent` and
//! `wire` know those, `incidents` stands on `agent`; then `store`, `metrics` and `timeline`, `outage`, `peers`, `sight`, `pulse` and `anchor`, `history`, `heartbeat`, `sweep`, `lease` and
//! `retention`, `session`, `safety`, `orders`, `transport` and `api` beside it, `server`, and `healthcheck` apart.
//! SQL is spoken in `store` only, axum in `api` and `server` only, hyper in `transport` and, as a
//! client, in `healthcheck` only. A test reads the sources and holds them to it.
//!
//! Two things differ from what one might expect. `pulse` stands between `store` and `history`
//! because a deadline is computed from a link's and a connection's signs of life alone, and both
//! the monitor and the flush need them without knowing sessions. And a connection's end goes
//! through `history` even when the link that carries it is gone: whoever notices first claims it.

pub mod agent;
pub mod anchor;
pub mod api;
pub mod burden;
pub mod clock;
pub mod close;
pub mod config;
pub mod healthcheck;
pub mod heartbeat;
pub mod history;
pub mod incidents;
pub mod lanes;
pub mod lease;
pub mod metrics;
pub mod orders;
pub mod outage;
pub mod peers;
pub mod proto;
pub mod pulse;
pub mod retention;
pub mod safety;
pub mod server;
pub mod session;
pub mod sight;
pub mod site;
pub mod store;
pub mod sweep;
pub mod timeline;
pub mod transport;
pub mod wire;
