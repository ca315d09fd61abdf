//! The process's limit of open files, on which the size of the fleet depends.
//!
//! Promises that a fleet that was let through has a file descriptor for every link. Must not
//! know why anybody wants so many.

use anyhow::{Context, bail};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Standard streams, the runtime's own descriptors, signals, and some air.
const BESIDES_LINKS: u64 = 64;

/// Raises the soft limit to the hard one; fails if even that cannot hold `links`.
pub(crate) fn raise_open_files(links: usize) -> anyhow::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
        setrlimit(Resource::Nofile, raised).context("cannot raise the limit of open files")?;
    }
    check(links, limit.maximum)
}

/// `hard` is absent where the system knows no limit.
fn check(links: usize, hard: Option<u64>) -> anyhow::Result<()> {
    let Some(hard) = hard else { return Ok(()) };
    let fitting = hard.saturating_sub(BESIDES_LINKS);
    if u64::try_from(links).is_ok_and(|wanted| wanted <= fitting) {
        return Ok(());
    }
    bail!(
        "{links} links do not fit: the hard limit of open files is {hard}, which leaves room \
         for {fitting}; use fewer --agents or raise the limit (ulimit -Hn, LimitNOFILE=)"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fleet_fits_up_to_the_hard_limit() {
        assert!(check(1000, None).is_ok());
        assert!(check(1000, Some(1000 + BESIDES_LINKS)).is_ok());
        assert!(check(1000, Some(999 + BESIDES_LINKS)).is_err());
        assert!(check(1, Some(3)).is_err());
    }
}
