//! What the server says of the past is what happened, as far as anybody could know: days of a fleet, crashes included,
//! against random questions, all of which must be answered exactly.

#![expect(clippy::expect_used, reason = "in a test a panic with a sentence is the report")]

mod days;
mod guide;
mod questions;
mod record;

use crate::harness::Database;

/// Where no other seed is asked for.
const SEED: u64 = 20_261_122;

#[tokio::test]
async fn sqlite_answers_what_happened() {
    questions::ask_everything(&Database::sqlite(), SEED).await;
}

#[tokio::test]
async fn postgres_answers_what_happened() {
    let Some(database) = Database::postgres().await else { return };
    questions::ask_everything(&database, SEED).await;
}
