//! A scripted agent: it says exactly what the test says, over a WebSocket or by polls.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use opamp_server::agent::InstanceUid;
use opamp_server::proto::any_value::Value;
use opamp_server::proto::{
    AgentConfigFile, AgentConfigMap, AgentDescription, AgentDisconnect, AgentToServer, AnyValue,
    ComponentHealth, EffectiveConfig, KeyValue, ServerErrorResponseType, ServerToAgent,
};
use prost::Message as _;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::{HeaderName, HeaderValue};
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Message};
use tokio_tungstenite::tungstenite::{Bytes, Error};
use tokio_tungstenite::{WebSocketStream, client_async};

use super::http::{Http, Response};
use super::server::{Ports, SOON};

/// `ReportsStatus`.
pub(crate) const STATUS: u64 = 0x1;
/// `ReportsEffectiveConfig`.
pub(crate) const EFFECTIVE_CONFIG: u64 = 0x4;
/// `AcceptsOpAMPConnectionSettings`.
pub(crate) const CONNECTION_SETTINGS: u64 = 0x100;
/// `ReportsHealth`.
pub(crate) const HEALTH: u64 = 0x800;
/// `ReportsHeartbeat`.
pub(crate) const HEARTBEATS: u64 = 0x2000;

/// The flag `ReportFullState` of an offer.
pub(crate) const FULL_STATE: u64 = 0x1;
/// The flag `RequestInstanceUid` of a report.
pub(crate) const REQUEST_UID: u64 = 0x1;

/// An agent that numbers its reports.
#[derive(Clone, Debug)]
pub(crate) struct Agent {
    pub(crate) uid: InstanceUid,
    /// The number of the next report.
    pub(crate) number: u64,
    pub(crate) capabilities: u64,
}

impl Agent {
    /// A new agent with a uid of its own.
    pub(crate) fn new() -> Self {
        Self { uid: InstanceUid::generate(), number: 0, capabilities: STATUS }
    }

    /// An agent that states these capabilities.
    pub(crate) fn with(capabilities: u64) -> Self {
        Self { capabilities, ..Self::new() }
    }

    /// The next report with nothing new in it: a heartbeat.
    pub(crate) fn report(&mut self) -> AgentToServer {
        let number = self.number;
        self.number = number.wrapping_add(1);
        AgentToServer {
            instance_uid: self.uid.as_bytes().to_vec(),
            sequence_num: number,
            capabilities: self.capabilities,
            ..AgentToServer::default()
        }
    }

    /// The next report, with everything its capabilities promise.
    pub(crate) fn full(&mut self) -> AgentToServer {
        let mut report = self.report();
        report.agent_description = Some(description(&[("service.name", "collector")]));
        if self.capabilities & HEALTH != 0 {
            report.health = Some(ComponentHealth { healthy: true, ..ComponentHealth::default() });
        }
        if self.capabilities & EFFECTIVE_CONFIG != 0 {
            report.effective_config = Some(effective_config("receivers: {}"));
        }
        report
    }

    /// The last report.
    pub(crate) fn farewell(&mut self) -> AgentToServer {
        AgentToServer { agent_disconnect: Some(AgentDisconnect {}), ..self.report() }
    }

    /// A report of the uid alone.
    pub(crate) fn bare(&self) -> AgentToServer {
        AgentToServer { instance_uid: self.uid.as_bytes().to_vec(), ..AgentToServer::default() }
    }
}

/// A description with these texts as identifying attributes.
pub(crate) fn description(attributes: &[(&str, &str)]) -> AgentDescription {
    AgentDescription {
        identifying_attributes: attributes.iter().map(|(key, text)| pair(key, text)).collect(),
        non_identifying_attributes: Vec::new(),
    }
}

/// An attribute with a text.
pub(crate) fn pair(key: &str, text: &str) -> KeyValue {
    let value = AnyValue { value: Some(Value::StringValue(text.to_owned())) };
    KeyValue { key: key.to_owned(), value: Some(value) }
}

/// An effective config of one file.
pub(crate) fn effective_config(body: &str) -> EffectiveConfig {
    let file = AgentConfigFile { body: body.into(), content_type: "text/yaml".to_owned() };
    EffectiveConfig { config_map: Some(AgentConfigMap { config_map: [(String::new(), file)].into() }) }
}

/// Checks that an offer is an error of this type, that it travels alone (S-030), and answers its text.
pub(crate) fn error_of(offer: &ServerToAgent, kind: ServerErrorResponseType) -> String {
    let Some(error) = &offer.error_response else { panic!("no error: {offer:?}") };
    assert_eq!(error.r#type, i32::from(kind), "{offer:?}");
    let alone = ServerToAgent {
        instance_uid: offer.instance_uid.clone(),
        error_response: offer.error_response.clone(),
        ..ServerToAgent::default()
    };
    assert_eq!(*offer, alone, "an error travels alone");
    error.error_message.clone()
}

/// Checks that an offer is a mere acknowledgement for this uid.
pub(crate) fn assert_acknowledged(offer: &ServerToAgent, uid: InstanceUid) {
    let plain = ServerToAgent {
        instance_uid: uid.as_bytes().to_vec(),
        capabilities: offer.capabilities,
        ..ServerToAgent::default()
    };
    assert_eq!(*offer, plain, "nothing but the acknowledgement");
}

/// What came over a WebSocket.
#[derive(Debug, PartialEq)]
pub(crate) enum Received {
    Offer(Box<ServerToAgent>),
    Ping,
    /// The Close frame's code and reason.
    Close(u16, String),
    /// The end of the stream, with or without a Close frame before.
    End,
}

/// A WebSocket that agents speak over; pings are answered while it is read.
#[derive(Debug)]
pub(crate) struct Socket {
    stream: WebSocketStream<TcpStream>,
}

impl Socket {
    pub(crate) async fn connect(server: &Ports) -> Self {
        Self::open(server, "/v1/opamp", &[]).await.expect("the handshake succeeds")
    }

    /// Tries a handshake; the error is what the server answered instead.
    pub(crate) async fn open(
        server: &Ports,
        path: &str,
        headers: &[(&'static str, &str)],
    ) -> Result<Self, Response> {
        let stream = TcpStream::connect(server.agents).await.expect("the port is open");
        let url = format!("ws://{}{path}", server.agents);
        let mut request = url.clone().into_client_request().expect("a request");
        for (name, value) in headers {
            let value = HeaderValue::from_str(value).expect("a header's value");
            request.headers_mut().insert(HeaderName::from_static(name), value);
        }
        match client_async(request, stream).await {
            Ok((stream, _)) => Ok(Self { stream }),
            Err(Error::Http(_)) => {
                // Once more in plain words: the client shows no whole answer.
                let mut upgrade = vec![
                    ("Connection", "Upgrade"),
                    ("Upgrade", "websocket"),
                    ("Sec-WebSocket-Version", "13"),
                    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
                ];
                upgrade.extend(headers.iter().copied());
                Err(Http::connect(server.agents).await.send("GET", path, &upgrade, &[]).await)
            }
            Err(error) => panic!("no answer to the handshake: {error}"),
        }
    }

    /// True where a handshake succeeds; a port on which nobody listens any more lets nobody in.
    pub(crate) async fn is_let_in(server: &Ports) -> bool {
        let Ok(stream) = TcpStream::connect(server.agents).await else { return false };
        client_async(format!("ws://{}/v1/opamp", server.agents), stream).await.is_ok()
    }

    /// Connects and sends the first report; answers the offer too.
    pub(crate) async fn greet(server: &Ports, first: &AgentToServer) -> (Self, ServerToAgent) {
        let mut socket = Self::connect(server).await;
        let offer = socket.exchange(first).await;
        (socket, offer)
    }

    pub(crate) async fn send(&mut self, report: &AgentToServer) {
        let mut frame = vec![0];
        report.encode(&mut frame).expect("a vector grows");
        self.send_bytes(frame).await;
    }

    pub(crate) async fn send_bytes(&mut self, frame: Vec<u8>) {
        self.send_message(Message::Binary(frame.into())).await;
    }

    pub(crate) async fn send_message(&mut self, message: Message) {
        self.stream.send(message).await.expect("the message is sent");
    }

    /// Sends a Close frame.
    pub(crate) async fn say_goodbye(&mut self) {
        let frame = CloseFrame { code: 1000.into(), reason: "".into() };
        self.send_message(Message::Close(Some(frame))).await;
    }

    /// Whatever comes next.
    pub(crate) async fn receive(&mut self) -> Received {
        let next = tokio::time::timeout(SOON, self.stream.next()).await.expect("something comes in time");
        match next {
            Some(Ok(Message::Binary(bytes))) => Received::Offer(Box::new(decode(&bytes))),
            Some(Ok(Message::Ping(_))) => Received::Ping,
            Some(Ok(Message::Close(Some(frame)))) => {
                Received::Close(frame.code.into(), frame.reason.to_string())
            }
            Some(Ok(other)) => panic!("the server never sends this: {other:?}"),
            Some(Err(_)) | None => Received::End,
        }
    }

    /// The next offer.
    pub(crate) async fn offer(&mut self) -> ServerToAgent {
        loop {
            match self.receive().await {
                Received::Offer(offer) => return *offer,
                Received::Ping => {}
                end @ (Received::Close(..) | Received::End) => panic!("no offer but {end:?}"),
            }
        }
    }

    pub(crate) async fn exchange(&mut self, report: &AgentToServer) -> ServerToAgent {
        self.send(report).await;
        self.offer().await
    }

    /// Waits for the Close frame and the orderly end after it (S-063); answers its code and reason.
    pub(crate) async fn closed(&mut self) -> (u16, String) {
        let close = loop {
            match self.receive().await {
                Received::Close(code, reason) => break (code, reason),
                Received::Ping => {}
                other @ (Received::Offer(_) | Received::End) => panic!("no Close frame but {other:?}"),
            }
        };
        assert_eq!(self.receive().await, Received::End, "nothing comes after the Close frame");
        close
    }

    /// Answers the pings that come, until so many have come.
    pub(crate) async fn answer_pings(&mut self, pings: usize) {
        for _ in 0..pings {
            assert_eq!(self.receive().await, Received::Ping);
        }
        // The last answer is written when the socket is used next.
        self.stream.flush().await.expect("the pong is sent");
    }

    /// Breaks off without a Close frame.
    pub(crate) fn break_off(self) {
        drop(self);
    }
}

fn decode(frame: &Bytes) -> ServerToAgent {
    assert_eq!(frame.first(), Some(&0), "the header is one zero byte (S-005)");
    ServerToAgent::decode(&frame[1..]).expect("an offer")
}

/// An agent's polls, on one connection that is kept alive.
#[derive(Debug)]
pub(crate) struct Poller {
    http: Http,
}

/// The offer in the answer to a poll.
pub(crate) fn offer_in(answer: &Response) -> ServerToAgent {
    assert_eq!(answer.status, 200, "{}", answer.text());
    ServerToAgent::decode(answer.body.as_slice()).expect("an offer")
}

/// The media type of a poll.
pub(crate) const PROTOBUF: (&str, &str) = ("Content-Type", "application/x-protobuf");

impl Poller {
    pub(crate) async fn connect(server: &Ports) -> Self {
        Self { http: Http::connect(server.agents).await }
    }

    /// Polls with any body and further headers.
    pub(crate) async fn post(&mut self, headers: &[(&str, &str)], body: &[u8]) -> Response {
        let mut all = vec![PROTOBUF];
        all.extend(headers);
        self.http.send("POST", "/v1/opamp", &all, body).await
    }

    /// Polls, which must be answered with 200, and reads the offer.
    pub(crate) async fn exchange(&mut self, report: &AgentToServer) -> ServerToAgent {
        let response = self.post(&[], &report.encode_to_vec()).await;
        assert_eq!(response.status, 200, "{}", response.text());
        assert_eq!(response.header("content-type"), Some("application/x-protobuf"));
        ServerToAgent::decode(response.body.as_slice()).expect("an offer")
    }

    /// Polls once on a connection of its own.
    pub(crate) async fn once(server: &Ports, report: &AgentToServer) -> ServerToAgent {
        Self::connect(server).await.exchange(report).await
    }
}

/// How long a silent agent may go unnoticed beyond its deadline.
pub(crate) const VERDICT_DELAY: Duration = Duration::from_secs(1);
