//! What must hold, each with a name by which it can be left out.

/// A promise of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rule {
    /// Rows of one agent never overlap, at most one is open, and the fence is the open one.
    Shape,
    /// Moments are in order: within a row, and from one change of status to the next.
    Order,
    /// Changes of status follow from each other, and the last one is the status.
    Log,
    /// Two verdicts for one connection.
    Twice,
    /// A row says `connected` for a time after the last proof.
    Claim,
    /// A row ends earlier than the last proof that its node had.
    Proof,
    /// An end that is said to have been seen was not, or not then.
    Seen,
    /// An end was seen late, because its link waited for the store.
    Late,
    /// The agent was heard, and no row covers that.
    Covered,
    /// As `Covered`, for a poll that was answered by a node which reaches the store and does not know yet that another
    /// ended the row.
    Stale,
    /// An end that names a cause that was not.
    Cause,
    /// An agent was called silent although something of it had arrived in time.
    Silence,
    /// An agent went offline within its return time.
    Return,
    /// The stored number stands for another state than the stored one.
    Number,
    /// Full state was asked for without need.
    Asked,
    /// An offer was sent before its connection was on record.
    Durable,
    /// A Close frame was sent before the end was on record.
    Close,
    /// A row is open and nobody lives who holds it, or somebody holds what is not open.
    Owner,
    /// In the end the record is not what is.
    Converged,
    /// A task of the server panicked, ended by itself, or spins.
    Panic,
}

impl Rule {
    pub(crate) const ALL: [Self; 20] = [
        Self::Shape,
        Self::Order,
        Self::Log,
        Self::Twice,
        Self::Claim,
        Self::Proof,
        Self::Seen,
        Self::Late,
        Self::Covered,
        Self::Stale,
        Self::Cause,
        Self::Silence,
        Self::Return,
        Self::Number,
        Self::Asked,
        Self::Durable,
        Self::Close,
        Self::Owner,
        Self::Converged,
        Self::Panic,
    ];

    fn named(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|rule| format!("{rule:?}").eq_ignore_ascii_case(word))
    }
}

/// The rules that are looked at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules(u32);

impl Rules {
    /// All rules but those in a list of names; the error is a name that is none.
    pub(crate) fn without(names: &str) -> Result<Self, String> {
        let names = names.split([',', ' ']).filter(|name| !name.is_empty());
        names.into_iter().try_fold(Self(u32::MAX), |rules, name| {
            let rule = Rule::named(name).ok_or_else(|| format!("no rule is called {name}"))?;
            Ok(Self(rules.0 & !(1 << rule as u32)))
        })
    }

    pub(crate) fn has(self, rule: Rule) -> bool {
        self.0 & (1 << rule as u32) != 0
    }
}
