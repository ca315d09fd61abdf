//! A very small HTTP/1.1 client: what it sends is what the test says, byte by byte.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

/// How long an answer may take.
const DEADLINE: Duration = Duration::from_secs(20);

/// An answer.
#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Response {
    /// The value of a header.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name))?;
        Some(&found.1)
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("no JSON: {}", self.text()))
    }
}

/// A connection that is kept alive from request to request.
#[derive(Debug)]
pub(crate) struct Http {
    address: SocketAddr,
    stream: BufReader<TcpStream>,
}

impl Http {
    pub(crate) async fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.expect("the port is open");
        stream.set_nodelay(true).expect("the option is known");
        Self { address, stream: BufReader::new(stream) }
    }

    /// Sends a request whose length is announced, and reads the answer.
    pub(crate) async fn send(
        &mut self,
        method: &str,
        target: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Response {
        let length = body.len().to_string();
        let mut headers = headers.to_vec();
        headers.push(("Content-Length", &length));
        self.write_head(method, target, &headers).await;
        // A server that refuses a body may hang up before it has read all of it.
        let _the_answer_tells = self.stream.get_mut().write_all(body).await;
        self.read().await
    }

    /// Sends a request in chunks of 1,000 bytes, its length not announced, and reads the answer.
    pub(crate) async fn send_chunked(
        &mut self,
        method: &str,
        target: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Response {
        let mut headers = headers.to_vec();
        headers.push(("Transfer-Encoding", "chunked"));
        self.write_head(method, target, &headers).await;
        let mut framed = Vec::new();
        for chunk in body.chunks(1_000) {
            framed.extend(format!("{:x}\r\n", chunk.len()).bytes());
            framed.extend(chunk);
            framed.extend(b"\r\n");
        }
        framed.extend(b"0\r\n\r\n");
        let _the_answer_tells = self.stream.get_mut().write_all(&framed).await;
        self.read().await
    }

    /// Sends these very bytes.
    pub(crate) async fn write(&mut self, bytes: &[u8]) {
        self.stream.get_mut().write_all(bytes).await.expect("the bytes are written");
    }

    /// Sends these very bytes, and reads the answer.
    pub(crate) async fn send_bytes(&mut self, bytes: &[u8]) -> Response {
        self.write(bytes).await;
        self.read().await
    }

    /// Says that nothing more comes.
    pub(crate) async fn finish(&mut self) {
        self.stream.get_mut().shutdown().await.expect("the socket is open");
    }

    /// Waits until the server hangs up; nothing comes before that.
    pub(crate) async fn ended(&mut self) {
        let mut rest = Vec::new();
        let end = tokio::time::timeout(DEADLINE, self.stream.read_to_end(&mut rest)).await;
        let _a_reset_is_an_end = end.expect("the server hangs up in time");
        assert_eq!(rest, b"", "nothing comes before the end");
    }

    /// The socket behind an upgrade, with whatever was read ahead.
    pub(crate) fn into_stream(self) -> BufReader<TcpStream> {
        self.stream
    }

    async fn write_head(&mut self, method: &str, target: &str, headers: &[(&str, &str)]) {
        let mut head = format!("{method} {target} HTTP/1.1\r\n");
        if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("host")) {
            head.extend(["Host: ", &self.address.to_string(), "\r\n"]);
        }
        for (name, value) in headers {
            head.extend([*name, ": ", *value, "\r\n"]);
        }
        head.push_str("\r\n");
        self.stream.get_mut().write_all(head.as_bytes()).await.expect("the head is written");
    }

    /// Reads the next answer; an interim one counts.
    pub(crate) async fn read(&mut self) -> Response {
        tokio::time::timeout(DEADLINE, self.read_answer()).await.expect("an answer in time")
    }

    async fn read_answer(&mut self) -> Response {
        let first = self.read_line().await;
        let status = first.split(' ').nth(1).and_then(|status| status.parse().ok());
        let status = status.unwrap_or_else(|| panic!("no status line: {first:?}"));
        let mut headers = Vec::new();
        loop {
            let line = self.read_line().await;
            let Some((name, value)) = line.split_once(':') else { break };
            headers.push((name.to_owned(), value.trim().to_owned()));
        }
        let mut response = Response { status, headers, body: Vec::new() };
        if let Some(length) = response.header("content-length") {
            response.body = vec![0; length.parse().expect("a length is a number")];
            self.stream.read_exact(&mut response.body).await.expect("the whole body");
        } else if response.header("transfer-encoding").is_some() {
            loop {
                let size = usize::from_str_radix(&self.read_line().await, 16).expect("the size of a chunk");
                let mut chunk = vec![0; size];
                self.stream.read_exact(&mut chunk).await.expect("the whole chunk");
                self.read_line().await;
                if size == 0 {
                    break;
                }
                response.body.extend(chunk);
            }
        }
        response
    }

    async fn read_line(&mut self) -> String {
        let mut line = String::new();
        self.stream.read_line(&mut line).await.expect("a line");
        line.trim_end().to_owned()
    }
}
