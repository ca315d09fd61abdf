//! Answers in other forms than a page of JSON: everything that was asked for, line by line.
//!
//! `Accept` decides. It must not know what is exported: a [`Table`] does.

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::Value;

use super::error::ApiError;
use super::stream::{Source, stream_all};

/// The form of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Representation {
    /// One document.
    Json,
    /// A document a line.
    Ndjson,
    /// RFC 4180, with a header line.
    Csv,
}

impl Representation {
    const ALL: [Self; 3] = [Self::Json, Self::Ndjson, Self::Csv];

    const fn media_type(self) -> &'static str {
        match self {
            Self::Json => "application/json",
            Self::Ndjson => "application/x-ndjson",
            Self::Csv => "text/csv",
        }
    }

    /// The form that `accept` likes best; of equals the first. None where it excludes all.
    fn choose(accept: &str) -> Option<Self> {
        let mut best: Option<(f32, Self)> = None;
        for form in Self::ALL {
            let liked = quality(accept, form.media_type());
            if liked > best.map_or(0.0, |(quality, _)| quality) {
                best = Some((liked, form));
            }
        }
        best.map(|(_, form)| form)
    }
}

/// How much `accept` likes a media type, 0 to 1, by the most specific range that names it.
fn quality(accept: &str, media_type: &str) -> f32 {
    let group = media_type.split_once('/').map_or(media_type, |(group, _)| group);
    let mut found = (0, 0.0);
    for range in accept.split(',') {
        let mut parts = range.split(';').map(str::trim);
        let name = parts.next().unwrap_or_default().to_ascii_lowercase();
        let specific = match name.as_str() {
            "*/*" => 1,
            name if name.strip_suffix("/*") == Some(group) => 2,
            name if name == media_type => 3,
            _ => continue,
        };
        let given = parts.find_map(|part| part.strip_prefix("q=").or_else(|| part.strip_prefix("Q=")));
        let quality = given.map_or(1.0, |text| text.parse().unwrap_or(0.0));
        if specific > found.0 {
            found = (specific, quality);
        }
    }
    found.1
}

impl<S: Send + Sync> FromRequestParts<S> for Representation {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, ApiError> {
        let ranges: Vec<&str> =
            parts.headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok()).collect();
        if ranges.is_empty() {
            return Ok(Self::Json);
        }
        Self::choose(&ranges.join(",")).ok_or(ApiError::NotAcceptable)
    }
}

/// A document whose form could have been another.
pub(super) fn document(body: impl Serialize) -> Response {
    let mut response = axum::Json(body).into_response();
    response.headers_mut().insert(header::VARY, HeaderValue::from_static("Accept"));
    response
}

/// What can be exported: in lines, and as CSV in columns.
pub(super) trait Table: Source<Item: Serialize> {
    /// The fields of an item, in the order of the columns.
    const COLUMNS: &'static [&'static str];
}

/// Streams everything a source has, in lines.
pub(super) async fn export<S: Table>(form: Representation, source: S) -> Result<Response, ApiError> {
    let mut head = Vec::new();
    if form == Representation::Csv {
        write_record(&mut head, S::COLUMNS.iter().map(|name| Some((*name).to_owned())));
    }
    let body = stream_all("an export", source, move |batch, text| {
        text.append(&mut head);
        batch.items.iter().try_for_each(|item| write_line::<S>(form, text, item))
    });
    let body = body.await?;
    let kind = match form {
        Representation::Csv => HeaderValue::from_static("text/csv; charset=utf-8; header=present"),
        Representation::Json | Representation::Ndjson => {
            HeaderValue::from_static(Representation::Ndjson.media_type())
        }
    };
    let headers = [(header::CONTENT_TYPE, kind), (header::VARY, HeaderValue::from_static("Accept"))];
    Ok((headers, body).into_response())
}

fn write_line<S: Table>(
    form: Representation,
    text: &mut Vec<u8>,
    item: &S::Item,
) -> Result<(), serde_json::Error> {
    if form != Representation::Csv {
        serde_json::to_writer(&mut *text, item)?;
        text.push(b'\n');
        return Ok(());
    }
    let item = serde_json::to_value(item)?;
    let fields = S::COLUMNS.iter().map(|name| match item.get(name) {
        None | Some(Value::Null) => None,
        Some(Value::String(word)) => Some(word.clone()),
        Some(other) => Some(other.to_string()),
    });
    write_record(text, fields);
    Ok(())
}

/// Writes one record of RFC 4180.
fn write_record(text: &mut Vec<u8>, fields: impl Iterator<Item = Option<String>>) {
    for (index, field) in fields.enumerate() {
        if index > 0 {
            text.push(b',');
        }
        let field = field.unwrap_or_default();
        // A spreadsheet takes these for the beginning of a formula, whoever wrote the field.
        let formula = field.starts_with(['=', '+', '-', '@', '\t', '\r']);
        if formula || field.contains(['"', ',', '\r', '\n']) {
            let guard = if formula { "'" } else { "" };
            text.extend(format!("\"{guard}{}\"", field.replace('"', "\"\"")).bytes());
        } else {
            text.extend(field.bytes());
        }
    }
    text.extend(b"\r\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accept_decides_the_form() {
        for (accept, form) in [
            ("*/*", Some(Representation::Json)),
            ("application/*", Some(Representation::Json)),
            ("text/*", Some(Representation::Csv)),
            ("text/csv", Some(Representation::Csv)),
            ("Application/X-NDJSON", Some(Representation::Ndjson)),
            ("text/html, */*;q=0.1", Some(Representation::Json)),
            ("text/csv;q=0.5, application/x-ndjson", Some(Representation::Ndjson)),
            ("application/json;q=0, */*", Some(Representation::Ndjson)),
            ("application/json, text/csv", Some(Representation::Json)),
            ("text/html", None),
            ("application/json;q=0", None),
            ("", None),
        ] {
            assert_eq!(Representation::choose(accept), form, "{accept}");
        }
    }

    #[test]
    fn a_record_is_quoted_where_it_must_and_no_field_is_a_formula() {
        let mut text = Vec::new();
        let fields = ["plain", "a,b", "say \"no\"", "two\r\nlines", "=1+1", "@x", "-1", ""];
        write_record(&mut text, fields.into_iter().map(|field| Some(field.to_owned())).chain([None]));
        assert_eq!(
            String::from_utf8(text).unwrap(),
            "plain,\"a,b\",\"say \"\"no\"\"\",\"two\r\nlines\",\"'=1+1\",\"'@x\",\"'-1\",,\r\n"
        );
    }
}
