//! What the outside asks of a run: commands on stdin, one per line, and signals.
//!
//! Promises that a line which is no command becomes an error and is not lost, and that the end of
//! input and both signals count as `quit`. Must not know how commands are carried out.

use std::{
    collections::VecDeque,
    io::{self, BufRead},
    thread,
};

use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};

/// Lines read ahead; the writer of more waits.
const READ_AHEAD: usize = 16;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Command {
    /// Every agent sends this many heartbeats now.
    Beat(u32),
    Quit,
    /// Not a command, and why.
    Mistake(String),
}

pub(crate) struct Control {
    commands: Option<mpsc::Receiver<Command>>,
    put_off: VecDeque<Command>,
    interrupt: Signal,
    terminate: Signal,
}

impl Control {
    /// Without `listen`, no command ever comes and stdin is left alone.
    pub(crate) fn new(listen: bool) -> io::Result<Self> {
        Ok(Self {
            commands: listen.then(commands).transpose()?,
            put_off: VecDeque::new(),
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    /// The next command; may be given up without losing one.
    pub(crate) async fn next(&mut self) -> Command {
        match self.put_off.pop_front() {
            Some(command) => command,
            None => self.arrival().await,
        }
    }

    /// Waits for the wish to quit; what else comes is put off.
    pub(crate) async fn quit(&mut self) {
        while self.put_off.len() < READ_AHEAD {
            match self.arrival().await {
                Command::Quit => return,
                other @ (Command::Beat(_) | Command::Mistake(_)) => self.put_off.push_back(other),
            }
        }
        self.signal().await;
    }

    /// Waits for SIGINT or SIGTERM.
    pub(crate) async fn signal(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }

    async fn arrival(&mut self) -> Command {
        tokio::select! {
            _ = self.interrupt.recv() => Command::Quit,
            _ = self.terminate.recv() => Command::Quit,
            command = next_of(&mut self.commands) => command,
        }
    }
}

async fn next_of(commands: &mut Option<mpsc::Receiver<Command>>) -> Command {
    match commands {
        Some(commands) => commands.recv().await.unwrap_or(Command::Quit),
        None => std::future::pending().await,
    }
}

fn commands() -> io::Result<mpsc::Receiver<Command>> {
    let (sender, commands) = mpsc::channel(READ_AHEAD);
    // A plain thread: reading stdin cannot be cancelled, and must not hold up the exit.
    thread::Builder::new().name("control".to_owned()).spawn(move || read(io::stdin().lock(), &sender))?;
    Ok(commands)
}

fn read(input: impl BufRead, sender: &mpsc::Sender<Command>) {
    for line in input.lines().map_while(Result::ok) {
        let command = parse(&line);
        if command.is_some_and(|command| sender.blocking_send(command).is_err()) {
            return;
        }
    }
}

/// `None` for an empty line.
fn parse(line: &str) -> Option<Command> {
    let mut words = line.split_whitespace();
    let command = match (words.next()?, words.next(), words.next()) {
        ("quit", None, None) => Command::Quit,
        ("beat", Some(count), None) => match count.parse() {
            Ok(count) => Command::Beat(count),
            Err(error) => Command::Mistake(format!("beat {count}: {error}")),
        },
        _ => Command::Mistake(format!("not a command: {line:?}; try `beat 1` or `quit`")),
    };
    Some(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_one_per_line() {
        assert_eq!(parse(" beat 3 "), Some(Command::Beat(3)));
        assert_eq!(parse("quit"), Some(Command::Quit));
        assert_eq!(parse("  "), None);
    }

    #[test]
    fn mistakes_are_told() {
        for wrong in ["beat", "beat -1", "beat 1 2", "quit now", "dance"] {
            assert!(matches!(parse(wrong), Some(Command::Mistake(_))), "{wrong}");
        }
    }

    #[test]
    fn the_end_of_input_ends_the_reader() {
        let (sender, mut commands) = mpsc::channel(4);
        read("beat 1\n\nquit\n".as_bytes(), &sender);
        drop(sender);
        assert_eq!(commands.blocking_recv(), Some(Command::Beat(1)));
        assert_eq!(commands.blocking_recv(), Some(Command::Quit));
        assert_eq!(commands.blocking_recv(), None);
    }
}
