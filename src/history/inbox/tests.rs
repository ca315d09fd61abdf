use serde_json::json;
use uuid::Uuid;

use super::*;
use crate::agent::Capabilities;
use crate::agent::document::Documents;
use crate::clock::{Moment, Tick};
use crate::close::CloseReason;
use crate::pulse::{Link, Pulse};
use crate::store::{ConnectionEnd, Ended, FirstReport, NewConnection, Transport};

fn uid(number: u8) -> InstanceUid {
    InstanceUid::from_bytes([number; 16])
}

/// The connection of agent `number`, with the same id.
fn connection(number: u8) -> Arc<OpenConnection> {
    let pulse = Pulse::starting(Tick::default(), Some(1));
    Arc::new(OpenConnection::new(
        uid(number),
        number.into(),
        Transport::Websocket,
        Arc::new(Link::default()),
        pulse,
    ))
}

fn job(write: Write, concern: Concern) -> (Job, oneshot::Receiver<Answered>) {
    let (answer, answered) = oneshot::channel();
    (Job::new(write, concern, None, None, answer), answered)
}

fn change(
    connection: &Arc<OpenConnection>,
    healthy: bool,
    name: Option<&str>,
) -> (Job, oneshot::Receiver<Answered>) {
    let documents = Documents {
        healthy: Some(healthy),
        custom_capabilities: name.map(|name| json!([name]).into()),
        ..Documents::default()
    };
    let update = AgentUpdate {
        agent: connection.agent,
        connection_id: connection.id,
        at: Moment::from_micros(1),
        read_at: Moment::from_micros(1),
        sequence_num: Some(2),
        capabilities: Capabilities(1),
        documents,
        late: false,
        node_id: Uuid::nil(),
    };
    job(Write::UpdateAgent(Box::new(update)), Concern::Saves(Arc::clone(connection)))
}

fn end(connection: &Arc<OpenConnection>) -> (Job, oneshot::Receiver<Answered>) {
    let end = ConnectionEnd {
        agent: connection.agent,
        connection_id: connection.id,
        reason: CloseReason::ConnectionLost,
        disconnected_at: Moment::from_micros(2),
        disconnected_by: None,
        last_seen_at: Moment::from_micros(2),
        sequence_num: None,
        unsaved: false,
        offline_at: None,
        unless_seen_after: None,
        node_id: Uuid::nil(),
    };
    job(Write::UpdateConnection(end), Concern::Ends(Arc::clone(connection)))
}

fn opening(number: u8) -> (Job, oneshot::Receiver<Answered>) {
    let documents = Documents { healthy: Some(true), ..Documents::default() };
    let report = FirstReport { sequence_num: Some(1), capabilities: Capabilities(1), documents };
    let new = NewConnection {
        agent: uid(number),
        transport: Transport::Websocket,
        remote_addr: "127.0.0.1:1".to_owned(),
        node_id: Uuid::nil(),
        node_seq: 0,
        at: Moment::from_micros(3),
        seen_at: Moment::from_micros(3),
        number: 1,
        older: None,
        spare: None,
        first_poll: None,
        poll_grace: std::time::Duration::ZERO,
        excused_until: None,
        first_report: Some(Arc::new(report)),
    };
    job(Write::CreateConnection(new), Concern::Nobody)
}

fn away() -> StoreError {
    StoreError::Unavailable("a test".to_owned())
}

fn agents(batch: &[Job]) -> Vec<(InstanceUid, u8)> {
    batch.iter().map(|job| (job.write.agent(), job.write.stage())).collect()
}

#[test]
fn a_kept_change_is_answered_merged_and_written_ahead_of_its_agents_end() {
    let (mut inbox, one, two) = (Inbox::default(), connection(1), connection(2));
    let (first, mut answered) = change(&one, true, Some("a"));
    inbox.keep(first);
    assert!(matches!(answered.try_recv().map(|answered| answered.reply), Ok(Reply::Kept)));
    inbox.keep(change(&one, false, None).0);
    assert_eq!((inbox.len(), one.pulse.number()), (1, None), "one newest state, and no number for it");
    inbox.push(end(&one).0);
    inbox.push(end(&two).0);
    let batch = inbox.take_batch(10);
    let [Job { write: Write::UpdateAgent(update), .. }] = batch.as_slice() else { panic!("{batch:?}") };
    assert_eq!(
        (update.documents.healthy, &update.documents.custom_capabilities),
        (Some(false), &Some(json!(["a"]).into()))
    );
    for job in batch {
        job.waiting.answer(Reply::Written(Written::Agent(true)));
    }
    assert_eq!(one.pulse.number(), Some(1), "what is stored stands for its number again");
    assert_eq!(agents(&inbox.take_batch(10)), [(uid(1), 1), (uid(2), 1)]);
}

/// What is written as the number of a connection that ends while a change of it is kept, and whether it is unsaved.
fn number_after(kept_became: impl Fn() -> Reply) -> (Option<u64>, bool) {
    let (mut inbox, one) = (Inbox::default(), connection(1));
    inbox.keep(change(&one, true, None).0);
    one.pulse.settled(Some(2), Some(2), false, false);
    let (mut ending, _ticket) = end(&one);
    let Write::UpdateConnection(end) = &mut ending.write else { panic!("{ending:?}") };
    (end.sequence_num, end.unsaved) = one.pulse.stands();
    assert_eq!((end.sequence_num, end.unsaved), (Some(2), true));
    inbox.push(ending);
    for job in inbox.take_batch(10) {
        job.waiting.answer(kept_became());
    }
    let batch = inbox.take_batch(10);
    let [Job { write: Write::UpdateConnection(end), .. }] = batch.as_slice() else { panic!("{batch:?}") };
    (end.sequence_num, end.unsaved)
}

#[test]
fn an_end_that_waited_for_a_kept_change_tells_the_number_of_what_is_stored() {
    assert_eq!(number_after(|| Reply::Written(Written::Agent(true))), (Some(2), false));
    let (_, unsaved) = number_after(|| Reply::Written(Written::Agent(false)));
    assert!(unsaved, "the store knows what is newer, and its number stands");
    assert_eq!(number_after(|| Reply::Failed(away())), (None, false), "nothing stands for any number");
}

#[test]
fn nobody_is_told_an_end_that_is_not_on_record() {
    for (reply, told) in [
        (Reply::Failed(StoreError::NodeEnded), false),
        (Reply::Written(Written::Connection(Ended { duration_seconds: Some(1), status: None })), true),
    ] {
        let one = connection(1);
        let (ending, _ticket) = end(&one);
        ending.waiting.answer(reply);
        assert!(one.is_recorded(), "nothing is waited for any more");
        assert_eq!(one.is_unrecordable(), !told);
    }
}

#[test]
fn polls_go_on_after_a_kept_change_came_too_late_and_a_link_does_not() {
    for (transport, ended) in [(Transport::Http, None), (Transport::Websocket, Some(CloseReason::Superseded))]
    {
        let link = Arc::new(Link::default());
        let pulse = Pulse::starting(Tick::default(), Some(1));
        let (mut inbox, one) =
            (Inbox::default(), Arc::new(OpenConnection::new(uid(1), 1, transport, link, pulse)));
        inbox.keep(change(&one, true, None).0);
        for job in inbox.take_batch(10) {
            job.waiting.answer(Reply::Written(Written::Agent(false)));
        }
        assert_eq!((one.ended(), one.forgot()), (ended, ended.is_none()), "{transport:?}");
    }
}

#[test]
fn a_change_that_cannot_be_stored_keeps_nobody_else_waiting_and_is_given_up() {
    let (mut inbox, odd, other) = (Inbox::default(), connection(1), connection(2));
    inbox.keep(change(&odd, true, None).0);
    let mut try_it = |successes| {
        let batch = inbox.take_batch(10);
        assert_eq!(agents(&batch), [(uid(1), 0)]);
        let back = batch.into_iter().filter_map(|job| inbox.put_back(job, &away(), true, successes));
        back.collect::<Vec<Job>>()
    };
    assert!(try_it(0).is_empty() && try_it(1).is_empty());
    assert!(try_it(1).is_empty(), "while nothing else is stored it proves nothing");
    inbox.push(end(&odd).0);
    inbox.push(end(&other).0);
    assert_eq!(agents(&inbox.take_batch(10)), [(uid(2), 1)], "others go ahead, its own end does not");
    let mut hopeless = Vec::new();
    for successes in 2..=u64::from(MOST_TRIES) {
        assert!(hopeless.is_empty());
        let batch = inbox.take_batch(10);
        hopeless.extend(batch.into_iter().filter_map(|job| inbox.put_back(job, &away(), true, successes)));
    }
    assert_eq!(hopeless.len(), 1);
    for job in hopeless {
        job.waiting.answer(Reply::Failed(away()));
    }
    assert!(odd.forgot(), "its agent is asked for everything");
    assert_eq!(odd.pulse.number(), None);
}

#[test]
fn while_the_store_is_away_only_ends_and_tried_openings_wait() {
    let (mut inbox, one, two) = (Inbox::default(), connection(1), connection(2));
    let (ending, _ticket) = end(&one);
    inbox.push(ending);
    let (saving, mut saved) = change(&two, true, None);
    inbox.push(saving);
    let (untried, mut refused) = opening(3);
    inbox.push(untried);
    let (tried, mut waits) = opening(4);
    assert!(inbox.put_back(tried, &away(), true, 0).is_none());
    inbox.give_up_waiting(&away());
    assert!(matches!(saved.try_recv().map(|answered| answered.reply), Ok(Reply::Kept)));
    assert!(matches!(refused.try_recv().map(|answered| answered.reply), Ok(Reply::Failed(_))));
    assert!(waits.try_recv().is_err(), "nobody knows whether it was done");
    assert_eq!(agents(&inbox.take_batch(10)), [(uid(2), 0)]);
    let batch = inbox.take_batch(10);
    assert_eq!(agents(&batch), [(uid(4), 2), (uid(1), 1)]);
    let again = batch.into_iter().find(|job| job.write.stage() == 2).unwrap();
    let Write::CreateConnection(new) = &again.write else { panic!("an opening: {again:?}") };
    assert!(new.first_report.is_none(), "its report is tried by itself");
    assert!(inbox.put_back(again, &away(), true, 0).is_none());
    assert!(
        matches!(waits.try_recv().map(|answered| answered.reply), Ok(Reply::Failed(_))),
        "twice is enough"
    );
}

#[test]
fn the_room_a_storm_needed_is_given_back() {
    let (mut inbox, one) = (Inbox::default(), connection(1));
    for _ in 0..1_000 {
        inbox.push(end(&one).0);
    }
    while inbox.len() > 0 {
        inbox.take_batch(10);
    }
    assert!(inbox.jobs.capacity() <= LEAST_ROOM, "{}", inbox.jobs.capacity());
}

#[test]
fn no_agent_is_twice_in_a_stage_of_a_batch() {
    let (mut inbox, one, two) = (Inbox::default(), connection(1), connection(2));
    for job in [end(&one).0, opening(1).0, opening(1).0, end(&two).0] {
        inbox.push(job);
    }
    assert_eq!(agents(&inbox.take_batch(10)), [(uid(1), 1), (uid(1), 2), (uid(2), 1)]);
    assert_eq!(agents(&inbox.take_batch(10)), [(uid(1), 2)]);
}
