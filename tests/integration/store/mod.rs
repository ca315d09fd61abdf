//! One promise, two databases: every case is a plain function over the store and runs on `SQLite` and on Postgres.
//!
//! A case takes `store`, one store on an empty database, or `database`, where it needs a second
//! store or a look past it. The list below is the whole suite: what is not listed does not run.

#![expect(clippy::expect_used, reason = "in a test a panic with a sentence is the report")]

mod batches;
mod ending;
mod identity;
mod lists;
mod memory;
mod migrations;
mod nodes;
mod observation;
mod opening;
mod orders;
mod polling;
mod retention;
pub(crate) mod scene;
mod schedules;
mod updating;
mod verdicts;

macro_rules! run {
    ($module:ident::$case:ident, store, $database:ident) => {
        super::$module::$case($database.open().await).await
    };
    ($module:ident::$case:ident, database, $database:ident) => {
        super::$module::$case(&$database).await
    };
}

macro_rules! conformance {
    ($($module:ident { $($case:ident($argument:ident),)* })*) => {
        mod sqlite {
            use crate::harness::Database;
            $($(
                #[tokio::test]
                async fn $case() {
                    let database = Database::sqlite();
                    run!($module::$case, $argument, database);
                }
            )*)*
        }

        mod postgres {
            use crate::harness::Database;
            $($(
                #[tokio::test]
                async fn $case() {
                    let Some(database) = Database::postgres().await else { return };
                    run!($module::$case, $argument, database);
                }
            )*)*
        }
    };
}

conformance! {
    opening {
        a_new_agent_gets_its_record_and_its_row_in_one_transaction(store),
        a_new_agent_s_first_report_is_stored_with_its_connection(database),
        a_first_report_is_stored_of_nobody_who_is_on_record(store),
        a_batch_holds_first_reports_beside_all_other_writes(store),
        an_agent_that_was_given_its_uid_is_new(store),
        a_known_agent_keeps_number_parts_and_capabilities(store),
        a_newcomer_takes_over_at_once(store),
        a_proof_in_memory_beats_an_older_one_on_record(store),
        who_continues_the_displaced_numbers_is_another_agent(store),
        near_numbers_prove_nothing_before_the_third_displacement(store),
        a_newcomer_ends_the_row_of_a_gone_node_as_server_lost(store),
        a_late_end_of_a_displaced_connection_changes_nothing(database),
        an_end_queued_ahead_of_a_newcomer_keeps_its_reason(store),
        moments_of_an_agent_never_go_back(store),
        an_opening_that_comes_late_begins_with_the_last_proof(store),
        the_status_log_never_goes_back(database),
        two_clean_stays_are_two_rows(store),
        an_opening_done_again_is_the_same_row(database),
        an_opening_sees_what_was_committed_while_it_waited(database),
    }
    ending {
        an_end_the_agent_caused_makes_it_offline_at_once(database),
        every_reason_is_one_word_and_has_one_effect(store),
        an_end_the_server_caused_leaves_the_agent_online_until_its_return_time(database),
        who_returns_in_time_is_not_overdue(store),
        a_pending_verdict_is_due_at_its_moment_and_not_before(store),
        a_duration_is_whole_seconds(store),
        an_end_is_never_before_its_beginning(store),
        an_end_that_was_not_seen_has_two_bounds(store),
        an_end_done_again_changes_nothing(store),
        an_end_ahead_of_a_change_leaves_the_number(store),
        a_temporary_uid_is_retired_by_its_end(store),
    }
    updating {
        an_update_after_a_take_over_changes_nothing(store),
        an_update_after_an_end_changes_nothing(store),
        a_kept_update_yields_to_a_newer_one(store),
        changed_parts_are_replaced_whole_and_absent_ones_stay(store),
        attributes_are_replaced_as_a_whole(database),
        odd_values_come_back_as_they_were(store),
        an_inventory_is_kept_per_hash(store),
        a_sign_of_life_needs_the_fence_and_never_goes_back(store),
        a_sign_of_life_that_meets_a_take_over_changes_nothing(database),
        a_number_that_is_unknown_is_stored_as_unknown(store),
    }
    polling {
        a_poll_in_time_goes_on_with_the_open_row(store),
        a_poll_after_its_deadline_ends_the_row_and_opens_a_new_one(store),
        a_websocket_ends_the_row_of_polls(store),
        a_poll_ends_the_row_of_a_websocket(store),
        a_poll_at_another_node_goes_on_with_the_row(store),
        a_slow_poller_keeps_its_row_over_a_start(store),
        a_verdict_on_a_poller_yields_to_a_later_poll(store),
        a_verdict_sees_the_poll_that_was_committed_while_it_waited(database),
        polled_connections_are_listed(store),
        a_start_ends_polls_that_stopped_and_keeps_the_others(store),
    }
    verdicts {
        marked_agents_that_stay_away_are_retired_and_others_are_errors(database),
        the_sweep_spares_all_or_none_as_told(store),
        the_sweep_waits_for_stale_after(store),
        a_sweep_of_many_is_complete(store),
        a_retired_agent_returns_to_the_same_record(store),
        an_agent_in_error_returns(store),
    }
    nodes {
        a_restart_ends_what_the_crash_left_open(database),
        a_restart_meets_agents_that_flee_to_a_peer(database),
        a_restart_moves_pending_verdicts(store),
        time_in_which_nobody_watched_makes_nobody_stale(store),
        a_start_leaves_the_rows_of_a_living_peer(database),
        rows_displaced_since_the_last_renewal_of_a_lost_node_are_server_lost(database),
        an_ended_node_cannot_renew(store),
        a_node_that_was_replaced_cannot_renew(store),
        peers_are_seen(database),
        a_lost_node_is_ended_once(database),
        strays_of_ended_nodes_are_ended(database),
        a_node_name_has_one_holder(database),
        a_lost_lock_on_a_name_is_taken_again(database),
        the_time_is_the_databases(store),
    }
    identity {
        a_deleted_agent_keeps_its_history(database),
        a_connected_agent_is_not_deleted(store),
        who_was_deleted_may_return(store),
        a_uid_is_assigned_once_until_it_is_used(store),
        an_unknown_agent_is_nothing(store),
    }
    observation {
        an_observation_has_all_who_were_connected(store),
        an_observation_of_too_many_ends_begins_later(store),
    }
    retention {
        what_is_past_its_time_is_forgotten_and_what_is_open_stays(store),
        retired_agents_without_history_are_forgotten(database),
        attributes_are_forgotten_with_their_agent(database),
        much_is_forgotten_in_batches(database),
        how_far_history_was_forgotten_is_kept(store),
        a_row_stays_while_it_speaks_of_later_time(store),
    }
    orders {
        an_order_is_for_the_open_connection(database),
        a_delete_outweighs_a_reconnect(store),
        a_delete_holds_whatever_ends_the_connection(database),
        a_delete_survives_the_node_that_had_to_carry_it_out(database),
        who_returns_before_the_order_is_carried_out_has_returned(store),
        a_delete_ends_polls_itself(store),
        a_delete_of_many_goes_by_batches(store),
        a_filter_is_looked_at_under_the_lock(database),
    }
    lists {
        a_list_is_narrowed_by_every_filter(store),
        a_list_is_narrowed_by_transport(store),
        a_list_is_narrowed_by_attributes(store),
        odd_attributes_are_found_as_they_are(store),
        an_agent_is_found_by_what_it_says_now(store),
        a_prefix_finds_id_name_and_host_in_any_case(store),
        a_search_finds_nobody_twice(store),
        a_search_is_narrowed_by_every_filter(store),
        the_longest_names_are_found(store),
        a_prefix_finds_names_beyond_ascii(store),
        a_prefix_is_no_pattern(store),
        unseen_agents_are_listed(store),
        retired_agents_are_hidden_unless_asked_for(store),
        pages_have_no_gaps_and_no_doubles_while_agents_arrive(store),
        a_summary_counts_every_agent_once(store),
        a_history_is_newest_first_and_paged(store),
        a_history_is_cut_by_from_and_to(store),
        the_active_connection_is_the_open_row(store),
        the_operators_view_shows_the_fleet(database),
    }
    batches {
        a_thousand_openings_are_one_transaction(database),
        a_large_fleet_is_stored_by_one_flush(database),
        a_poisoned_batch_leaves_nothing_behind(database),
        an_empty_batch_is_nothing(store),
        answers_come_in_the_order_of_the_batch(store),
        two_writers_share_the_same_agents(database),
    }
    migrations {
        going_down_and_up_again_works_with_rows_in_the_tables(database),
        a_missing_migration_is_named(database),
        an_unknown_breaking_migration_is_refused(database),
        an_unknown_migration_that_breaks_nothing_is_tolerated(database),
        stores_that_start_together_migrate_once(database),
        a_long_reader_holds_up_no_fleet(database),
        an_upgrade_takes_the_oldest_end_for_the_horizon(database),
        attributes_outlive_migrations_in_both_directions(database),
    }
    schedules {
        any_schedule_keeps_the_history_true(database),
    }
}
