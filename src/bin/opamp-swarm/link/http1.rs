//! As much of HTTP/1.1 as a polling agent needs: one kind of request, and responses of any framing.
//!
//! Promises to keep nothing between two polls (a general client costs 28 KiB for each agent), and
//! to tell an unfinished response from a broken one. Pure: bytes in, bytes out; must not know
//! sockets.

use std::io::{Read, Write};

use flate2::{Compression, read::GzDecoder, write::GzEncoder};
use hyper::{
    HeaderMap, StatusCode,
    header::{CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, HeaderName, HeaderValue, TRANSFER_ENCODING},
};
use opamp_server::proto::AgentToServer;
use prost::Message;
use uuid::Uuid;

use crate::{endpoint::Endpoint, loss::Loss};

const AGENT: &str = concat!("opamp-swarm/", env!("CARGO_PKG_VERSION"));
const MAX_HEAD: usize = 16 * 1024;
const BROKEN: Loss = Loss::Malformed("bad_http");

/// A complete response.
#[derive(Debug)]
pub(super) struct Response {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Vec<u8>,
    /// The connection is good for another request.
    pub(super) reusable: bool,
}

impl Response {
    /// The body, unpacked where it is packed; no more of it than `limit` bytes.
    pub(super) fn unpacked(self, limit: usize) -> Result<Vec<u8>, Loss> {
        let coding = self.headers.get(CONTENT_ENCODING).map_or(&b"identity"[..], HeaderValue::as_bytes);
        if coding.eq_ignore_ascii_case(b"identity") {
            return Ok(self.body);
        }
        if !coding.eq_ignore_ascii_case(b"gzip") {
            return Err(BROKEN);
        }
        let mut body = Vec::new();
        let bound = u64::try_from(limit).unwrap_or(u64::MAX);
        GzDecoder::new(&self.body[..]).take(bound).read_to_end(&mut body).map_err(|_| BROKEN)?;
        Ok(body)
    }
}

/// The POST that carries a report.
pub(super) fn request(endpoint: &Endpoint, report: &AgentToServer) -> Vec<u8> {
    let uri = &endpoint.uri;
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let host = uri.authority().map_or("", |authority| authority.as_str());
    let uid = Uuid::from_slice(&report.instance_uid).unwrap_or_default();
    let (body, coding) = if endpoint.gzip {
        (packed(&report.encode_to_vec()), "Content-Encoding: gzip\r\nAccept-Encoding: gzip\r\n")
    } else {
        (report.encode_to_vec(), "")
    };
    let length = body.len();
    let mut head = format!(
        "POST {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: {AGENT}\r\n\
         Content-Type: application/x-protobuf\r\nOpAMP-Instance-UID: {uid}\r\n\
         {coding}Content-Length: {length}\r\n"
    );
    if let Some(value) = endpoint.authorization.as_ref().and_then(|v| v.to_str().ok()) {
        head.push_str("Authorization: ");
        head.push_str(value);
        head.push_str("\r\n");
    }
    head.push_str("\r\n");
    let mut bytes = head.into_bytes();
    bytes.extend_from_slice(&body);
    bytes
}

fn packed(body: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    // Writing into a vector does not fail.
    let _infallible = encoder.write_all(body);
    encoder.finish().unwrap_or_default()
}

/// The response in `bytes`, unless more of it is to come; `ended` says that nothing will.
pub(super) fn response(bytes: &[u8], ended: bool) -> Result<Option<Response>, Loss> {
    let Some(end) = find(bytes, b"\r\n\r\n") else {
        return if bytes.len() > MAX_HEAD { Err(BROKEN) } else { Ok(None) };
    };
    let (head, rest) = (&bytes[..end], &bytes[end + 4..]);
    let (status, headers) = parse_head(head)?;
    if status.is_informational() {
        return response(rest, ended);
    }
    let Some(body) = body(status, &headers, rest, ended)? else {
        return Ok(None);
    };
    let closes = headers.get(CONNECTION).is_some_and(|v| v.as_bytes().eq_ignore_ascii_case(b"close"));
    Ok(Some(Response {
        status,
        headers,
        body: body.bytes,
        reusable: !closes && !ended && body.length == rest.len(),
    }))
}

fn parse_head(head: &[u8]) -> Result<(StatusCode, HeaderMap), Loss> {
    let head = str::from_utf8(head).map_err(|_| BROKEN)?;
    let mut lines = head.split("\r\n");
    let status_line = lines.next().unwrap_or_default();
    let status = status_line.strip_prefix("HTTP/1.").and_then(|line| line.split(' ').nth(1));
    let status = status.and_then(|code| code.parse().ok()).ok_or(BROKEN)?;
    let mut headers = HeaderMap::new();
    for line in lines {
        let (name, value) = line.split_once(':').ok_or(BROKEN)?;
        let name: HeaderName = name.parse().map_err(|_| BROKEN)?;
        let value: HeaderValue = value.trim().parse().map_err(|_| BROKEN)?;
        headers.append(name, value);
    }
    Ok((status, headers))
}

/// A complete body, and how many bytes it took on the wire.
struct Body {
    bytes: Vec<u8>,
    length: usize,
}

fn body(status: StatusCode, headers: &HeaderMap, rest: &[u8], ended: bool) -> Result<Option<Body>, Loss> {
    if [StatusCode::NO_CONTENT, StatusCode::NOT_MODIFIED].contains(&status) {
        return Ok(Some(plain(&[])));
    }
    if let Some(coding) = headers.get(TRANSFER_ENCODING) {
        let chunked = coding.as_bytes().eq_ignore_ascii_case(b"chunked");
        return if chunked { unchunk(rest) } else { Err(BROKEN) };
    }
    let Some(length) = headers.get(CONTENT_LENGTH) else {
        return Ok(ended.then(|| plain(rest)));
    };
    let length = length.to_str().ok().and_then(|text| text.parse().ok()).ok_or(BROKEN)?;
    Ok(rest.get(..length).map(plain))
}

fn plain(bytes: &[u8]) -> Body {
    Body { bytes: bytes.to_vec(), length: bytes.len() }
}

/// Joins the chunks; trailers are read and dropped.
fn unchunk(mut rest: &[u8]) -> Result<Option<Body>, Loss> {
    let (all, mut bytes) = (rest.len(), Vec::new());
    loop {
        let Some((line, after)) = split_line(rest) else {
            return Ok(None);
        };
        let size = str::from_utf8(line).ok().and_then(|line| line.split(';').next());
        let size = size.and_then(|size| usize::from_str_radix(size.trim(), 16).ok()).ok_or(BROKEN)?;
        if size == 0 {
            rest = after;
            break;
        }
        let Some((chunk, after)) = after.split_at_checked(size) else {
            return Ok(None);
        };
        bytes.extend_from_slice(chunk);
        match split_line(after) {
            Some(([], after)) => rest = after,
            Some(_) => return Err(BROKEN),
            None => return Ok(None),
        }
    }
    while let Some((trailer, after)) = split_line(rest) {
        rest = after;
        if trailer.is_empty() {
            let length = all - rest.len();
            return Ok(Some(Body { bytes, length }));
        }
    }
    Ok(None)
}

fn split_line(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = find(bytes, b"\r\n")?;
    Some((&bytes[..end], &bytes[end + 2..]))
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Complete only as a whole: no beginning of it may be taken for a response, or for broken.
    fn whole(text: &str) -> Option<Response> {
        for length in 0..text.len() {
            assert!(matches!(response(&text.as_bytes()[..length], false), Ok(None)), "{length}");
        }
        response(text.as_bytes(), false).ok().flatten()
    }

    #[test]
    fn a_body_of_known_length() {
        let found = whole("HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc");
        assert!(found.is_some_and(|r| r.status == 200 && r.body == b"abc" && r.reusable));
    }

    #[tokio::test]
    async fn a_report_is_packed_where_that_is_wanted() {
        let report = AgentToServer { instance_uid: vec![7; 16], sequence_num: 9, ..AgentToServer::default() };
        for gzip in [false, true] {
            let target = "http://127.0.0.1:1/v1/opamp".parse();
            let endpoint = Endpoint::resolve(target.unwrap(), Vec::new(), None, gzip).await.unwrap();
            let bytes = request(&endpoint, &report);
            let end = find(&bytes, b"\r\n\r\n").unwrap();
            let head = str::from_utf8(&bytes[..end]).unwrap();
            let body = bytes[end + 4..].to_vec();
            assert!(head.contains(&format!("Content-Length: {}", body.len())), "{head}");
            assert_eq!(head.contains("Content-Encoding: gzip"), gzip, "{head}");
            assert_eq!(head.contains("Accept-Encoding: gzip"), gzip, "{head}");
            let mut headers = HeaderMap::new();
            if gzip {
                headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
            }
            let sent = Response { status: StatusCode::OK, headers, body, reusable: true };
            assert_eq!(sent.unpacked(1000).unwrap(), report.encode_to_vec());
        }
    }

    #[test]
    fn a_packed_body_is_unpacked_up_to_the_limit() {
        let body = packed(&[7; 1000]);
        let head =
            format!("HTTP/1.1 200 OK\r\ncontent-encoding: GZip\r\ncontent-length: {}\r\n\r\n", body.len());
        let bytes = [head.as_bytes(), &body].concat();
        let unpacked = |limit| response(&bytes, false).ok().flatten().map(|found| found.unpacked(limit));
        assert!(unpacked(1000).is_some_and(|body| body.is_ok_and(|body| body == [7; 1000])));
        assert!(unpacked(10).is_some_and(|body| body.is_ok_and(|body| body.len() == 10)));
        let unknown = whole("HTTP/1.1 200 OK\r\ncontent-encoding: br\r\ncontent-length: 0\r\n\r\n");
        assert!(unknown.is_some_and(|found| found.unpacked(10).is_err()));
    }

    #[test]
    fn a_body_in_chunks() {
        let text = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: Close\r\n\r\n\
                    3;x=y\r\nabc\r\nA\r\n0123456789\r\n0\r\nTrailer: t\r\n\r\n";
        let found = whole(text);
        assert!(found.is_some_and(|r| r.body == b"abc0123456789" && !r.reusable));
    }

    #[test]
    fn a_body_that_ends_with_the_connection() {
        let bytes = b"HTTP/1.0 401 \r\nretry-after: 7\r\n\r\nno";
        assert!(matches!(response(bytes, false), Ok(None)));
        let found = response(bytes, true).ok().flatten();
        assert!(found.is_some_and(|r| r.status == 401 && r.body == b"no" && !r.reusable));
    }

    #[test]
    fn an_interim_response_is_passed_over() {
        let found = whole("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n");
        assert!(found.is_some_and(|r| r.status == 204 && r.body.is_empty()));
    }

    #[test]
    fn nonsense_is_broken() {
        for text in [
            "SSH-2.0-x\r\n\r\n",
            "HTTP/1.1 abc\r\n\r\n",
            "HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nabc\r\n",
        ] {
            assert!(response(text.as_bytes(), false).is_err(), "{text:?}");
        }
        assert!(response(&vec![b'x'; MAX_HEAD + 1], false).is_err());
    }
}
