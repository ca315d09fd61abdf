//! The question for full state: owed until it was put, and put once more where nothing came of it.
//!
//! Pure. It must not know why an agent is asked, nor how an answer travels.

use std::time::Duration;

use crate::clock::Tick;

/// After this long without its full state an agent is asked once more: the answer with the question may be lost while
/// the agent's numbers go on without a gap. Reports that follow in order ask no sooner.
const REMINDER: Duration = Duration::from_mins(1);

/// So often for each question: there are agents that never tell a part again which they told once.
const MOST_REMINDERS: u8 = 3;

/// Whether an agent is to be asked for its full state.
#[derive(Clone, Copy, Debug)]
pub(super) struct Question {
    /// True where it is to be asked and was not: others were before it.
    owed: bool,
    /// When it was asked last.
    asked_at: Tick,
    /// How often it was asked again since something was found missing.
    reminders: u8,
}

impl Question {
    /// Nothing to ask since `now`.
    pub(super) fn new(now: Tick) -> Self {
        Self { owed: false, asked_at: now, reminders: 0 }
    }

    /// True where it is to be asked and was not.
    pub(super) fn is_owed(&self) -> bool {
        self.owed
    }

    /// Something is found missing: the agent is to be asked.
    pub(super) fn owe(&mut self) {
        (self.owed, self.reminders) = (true, 0);
    }

    /// Nothing is missing any more.
    pub(super) fn settle(&mut self) {
        (self.owed, self.reminders) = (false, 0);
    }

    /// True where an agent that still has not told everything is to be asked again.
    pub(super) fn is_due_again(&self, now: Tick) -> bool {
        !self.owed && self.reminders < MOST_REMINDERS && now.since(self.asked_at) >= REMINDER
    }

    /// The agent is to be asked again.
    pub(super) fn remind(&mut self) {
        (self.owed, self.reminders) = (true, self.reminders + 1);
    }

    /// True where it is put now, if `has_turn` says that its turn has come.
    pub(super) fn put(&mut self, now: Tick, has_turn: impl FnOnce() -> bool) -> bool {
        let put = self.owed && has_turn();
        if put {
            (self.owed, self.asked_at) = (false, now);
        }
        put
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: u64) -> Tick {
        Tick::from_micros(second * 1_000_000)
    }

    /// Reports at `now` that nothing is missing, or that something still is; true where the agent is asked.
    fn report(question: &mut Question, now: Tick, missing: bool) -> bool {
        if !missing {
            question.settle();
        } else if question.is_due_again(now) {
            question.remind();
        }
        question.put(now, || true)
    }

    /// The seconds at which an agent is asked that reports each 20 s and has told everything at `told`. Something is
    /// missing from the first of them, and from `lost`.
    fn asked(told: u64, lost: u64) -> Vec<u64> {
        let mut question = Question::new(at(0));
        let asks = |second: &u64| {
            if [0, lost].contains(second) {
                question.owe();
            }
            report(&mut question, at(*second), *second < told || *second >= lost)
        };
        (0..=600).step_by(20).filter(asks).collect()
    }

    /// what follows a gap in order is not asked about again, but for an answer that was lost.
    #[test]
    fn who_does_not_answer_is_asked_again_and_not_for_ever() {
        assert_eq!(asked(1_000, 1_000), [0, 60, 120, 180]);
        assert_eq!(asked(100, 1_000), [0, 60]);
        assert_eq!(asked(100, 160), [0, 60, 160, 220, 280, 340], "each loss has reminders of its own");
        assert_eq!(asked(1_000, 400), [0, 60, 120, 180, 400, 460, 520, 580]);
    }

    #[test]
    fn a_question_waits_for_its_turn() {
        let mut question = Question::new(at(0));
        assert!(!question.put(at(0), || true), "nothing is missing");
        question.owe();
        assert!(!question.put(at(1), || false));
        assert!(!question.is_due_again(at(200)), "it was not put yet");
        assert!(question.put(at(200), || true));
        assert!(!question.is_due_again(at(259)), "it has a minute from when it was put");
        assert!(question.is_due_again(at(260)));
    }
}
