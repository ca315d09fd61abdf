//! What the history says after faults: a store that is away or refuses a report, nodes that are lost, rows that nobody
//! holds.

#![expect(clippy::expect_used, reason = "in a test a panic with a sentence is the report")]

mod away;
mod nodes;
mod odd;
mod safety;

use crate::harness::Database;

macro_rules! on_both {
    ($($module:ident::$test:ident,)*) => {
        mod on_sqlite {
            $(#[tokio::test]
            async fn $test() {
                super::$module::$test(&super::Database::sqlite()).await;
            })*
        }
        mod on_postgres {
            $(#[tokio::test]
            async fn $test() {
                let Some(database) = super::Database::postgres().await else { return };
                super::$module::$test(&database).await;
            })*
        }
    };
}

on_both! {
    away::a_change_is_answered_and_stored_on_return,
    away::a_change_that_is_lost_in_a_crash_is_asked_for_once,
    away::an_end_keeps_its_moment,
    away::a_stop_without_the_store_ends_in_time,
    odd::a_first_report_that_the_store_refuses_is_refused_alone,
    safety::a_row_that_nobody_holds_is_ended,
    safety::a_connection_without_a_row_gets_a_new_one,
    safety::polls_without_a_row_get_a_new_one,
}
