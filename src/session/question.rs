//! The question for full state: owed until it was put, and put once more where nothing came of it.
//!
//! Pure. It must not know why an agent is asked, nor how an answer travels.

use std::time::Duration;

use crate::clock::Tick;

/// After this long without its full state an agent is asked once more: the answer with the question may be lost while
/// the agent's numbers go on without a gap (R-004: not more often).
const REMINDER: Duration = Duration::from_mins(1);

/// So often in a row: there are agents that never tell a part again which they told once.
const MOST_REMINDERS: u8 = 3;

/// Whether an agent is to be asked for its full state.
#[derive(Clone, Copy, Debug)]
pub(super) struct Question {
    /// True where it is to be asked and was not: others were before it.
    owed: bool,
    /// When it was asked last.
    asked_at: Tick,
    /// How often it was asked again since it last told everything.
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

    /// The agent is to be asked.
    pub(super) fn owe(&mut self) {
        self.owed = true;
    }

    /// Nothing is missing any more.
    pub(super) fn settle(&mut self) {
        self.owed = false;
        self.reminders = 0;
    }

    /// Notes that the agent reported, and that parts of its state are `missing` since a question: it may be owed anew.
    pub(super) fn note_report(&mut self, missing: bool, now: Tick) {
        let waited = now.since(self.asked_at) >= REMINDER;
        if missing && waited && !self.owed && self.reminders < MOST_REMINDERS {
            self.reminders += 1;
            self.owed = true;
        }
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

    /// The seconds at which an agent is asked that reports each 20 s and never tells what is missing.
    fn asked(missing: impl Fn(u64) -> bool) -> Vec<u64> {
        let mut question = Question::new(at(0));
        question.owe();
        let asks = |second: &u64| {
            if missing(*second) {
                question.note_report(true, at(*second));
            } else {
                question.settle();
            }
            question.put(at(*second), || true)
        };
        (0..=600).step_by(20).filter(asks).collect()
    }

    #[test]
    fn who_does_not_answer_is_asked_again_and_not_for_ever() {
        assert_eq!(asked(|_| true), [0, 60, 120, 180]);
        assert_eq!(asked(|second| second < 100), [0, 60]);
        assert_eq!(asked(|second| !(100..=140).contains(&second)), [0, 60, 160, 220, 280], "it began anew");
    }

    #[test]
    fn a_question_waits_for_its_turn() {
        let mut question = Question::new(at(0));
        assert!(!question.put(at(0), || true), "nothing is missing");
        question.owe();
        assert!(!question.put(at(1), || false));
        question.note_report(true, at(200));
        assert!(question.put(at(200), || true));
        question.note_report(true, at(259));
        assert!(!question.is_owed(), "it has a minute from when it was put");
    }
}
