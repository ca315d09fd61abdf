//! Answers that are longer than anybody should hold: batch by batch, as they are read.
//!
//! A failure in the middle breaks the answer off, so that it never looks complete. It must not know what is
//! streamed, a [`Source`] does, nor how it is written.

use std::future::Future;

use axum::BoxError;
use axum::body::{Body, Bytes};
use futures_util::stream;

use super::error::ApiError;
use crate::store::StoreError;

/// How many items a batch has.
pub(super) const BATCH: u32 = 1_000;

/// The next items of a source.
pub(super) struct Batch<T> {
    pub(super) items: Vec<T>,
    /// True where there are, or may be, more after these.
    pub(super) more: bool,
}

impl<T> Batch<T> {
    /// What was read with a limit of [`BATCH`].
    pub(super) fn of_page(items: Vec<T>) -> Self {
        Self { more: items.len() >= BATCH as usize, items }
    }
}

/// Where items come from.
pub(super) trait Source: Send + 'static {
    /// One of them.
    type Item: Send;
    /// The next ones; nobody asks for more where there are none.
    fn next(&mut self) -> impl Future<Output = Result<Batch<Self::Item>, StoreError>> + Send;
}

/// A body of everything that a source has; `write` turns each batch into text.
pub(super) async fn stream_all<S: Source>(
    what: &'static str,
    mut source: S,
    write: impl FnMut(&Batch<S::Item>, &mut Vec<u8>) -> Result<(), serde_json::Error> + Send + 'static,
) -> Result<Body, ApiError> {
    // Before the answer begins, a failure still has a status of its own.
    let first = source.next().await?;
    let state = Some((source, Some(first), write));
    let body = stream::try_unfold(state, move |state| async move {
        let Some((mut source, first, mut write)) = state else { return Ok(None) };
        let read = match first {
            Some(batch) => Ok(batch),
            None => source.next().await,
        };
        if let Err(error) = &read {
            tracing::warn!(%error, "{what} was broken off");
            // An error drops what the HTTP connection has not sent; a pause lets it send the batches before.
            tokio::task::yield_now().await;
        }
        let batch = read?;
        let mut text = Vec::new();
        write(&batch, &mut text)?;
        Ok::<_, BoxError>(Some((Bytes::from(text), batch.more.then_some((source, None, write)))))
    });
    Ok(Body::from_stream(body))
}
