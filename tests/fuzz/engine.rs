//! The engine: picks an input, mutates it, runs it, keeps it where it made something new happen.
//!
//! One seed gives one run, on one machine as on another (the HTTP target's order of answers aside).

use std::any::Any;
use std::collections::hash_map::DefaultHasher;
use std::fmt::Write as _;
use std::fs;
use std::hash::{Hash, Hasher};
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use fastrand::Rng;

/// Inputs that may be kept for mutation beside the committed ones.
const KEPT: usize = 6_000;

/// Bits in the map of what has happened.
const MAP: usize = 1 << 22;

/// How long nothing may come back before the run is given up as hanging.
const HANG: Duration = Duration::from_secs(40);

/// The resident memory at which a run is given up as growing.
const MEMORY_LIMIT: u64 = 2 << 30;

/// Inputs for which a broken promise is made smaller.
const SHRINKING: usize = 20_000;

/// How many inputs a target takes where nobody says otherwise.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) runs: u64,
}

/// What an input made happen, as numbers; equal numbers are the same event.
#[derive(Debug, Default)]
pub(crate) struct Happened(Vec<u64>);

impl Happened {
    /// Notes an event.
    pub(crate) fn note(&mut self, event: impl Hash) {
        let mut hasher = DefaultHasher::new();
        event.hash(&mut hasher);
        self.0.push(hasher.finish());
    }
}

/// What became of one input.
pub(crate) type Outcome = (Happened, Result<(), String>);

/// A place where bytes come in.
pub(crate) trait Target {
    /// Its name: of the test, of the corpus' folder.
    const NAME: &'static str;

    /// The largest input in bytes.
    const LARGEST: usize;

    /// How many inputs are run at a time.
    const AT_ONCE: usize = 1;

    /// How long one input may take in a release build.
    const PATIENCE: Duration;

    /// A new input from one, and from others to take parts of.
    fn mutate(&self, rng: &mut Rng, input: &[u8], other: &[u8]) -> Vec<u8>;

    /// Runs inputs; an error names a broken promise.
    fn run(&mut self, inputs: &[Vec<u8>]) -> Vec<Outcome>;

    /// Looks at what no single input is to blame for.
    fn check(&mut self) -> Result<(), String> {
        Ok(())
    }
}

/// Runs one input of a pure target; a panic is a broken promise.
pub(crate) fn guarded(run: impl FnOnce(&mut Happened) -> Result<(), String>) -> Outcome {
    let mut happened = Happened::default();
    let result = catch_unwind(AssertUnwindSafe(|| run(&mut happened)))
        .unwrap_or_else(|panic| Err(format!("panic: {}", words_of(panic.as_ref()))));
    (happened, result)
}

fn words_of(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no words")
}

/// What the environment says: `scripts/fuzz` sets it from its arguments.
struct Settings {
    runs: Option<u64>,
    seed: u64,
    minutes: Option<f64>,
    replay: Option<Vec<u8>>,
    /// Where inputs go that made something new happen.
    keep: Option<PathBuf>,
    /// How much slower than a release build this one may be.
    slowness: u32,
}

impl Settings {
    #[expect(clippy::disallowed_methods, reason = "the environment tells a test how long to run")]
    fn read() -> Self {
        let read = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let number = |name: &str| read(name).map(|value| value.parse().expect("a whole number"));
        Self {
            runs: number("FUZZ_RUNS"),
            seed: number("FUZZ_SEED").unwrap_or(1),
            minutes: read("FUZZ_MINUTES").map(|value| value.parse().expect("a number of minutes")),
            replay: read("FUZZ_INPUT").map(|value| input_of(&value)),
            keep: read("FUZZ_KEEP").map(PathBuf::from),
            slowness: read("FUZZ_SLOWNESS").map_or(20, |value| value.parse().expect("a whole number")),
        }
    }
}

/// An input given as a file, as hex or as base64.
fn input_of(value: &str) -> Vec<u8> {
    if let Ok(bytes) = fs::read(value) {
        return bytes;
    }
    let hex = value.len().is_multiple_of(2) && value.bytes().all(|digit| digit.is_ascii_hexdigit());
    if hex {
        return (0..value.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&value[at..at + 2], 16).expect("hex"))
            .collect();
    }
    BASE64.decode(value).expect("FUZZ_INPUT is a file, hex or base64")
}

/// The corpus' folder of a target.
pub(crate) fn folder(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target)
}

/// The committed inputs of a target, by name.
pub(crate) fn committed(target: &str) -> Vec<(String, Vec<u8>)> {
    let mut found: Vec<_> = fs::read_dir(folder(target))
        .expect("the corpus is there")
        .map(|entry| {
            let path = entry.expect("a file").path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            (name, fs::read(&path).expect("a file"))
        })
        .collect();
    found.sort();
    found
}

/// Resident memory of this process in bytes; 0 where the system does not tell.
fn resident() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
    line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or_default() << 10
}

/// What a thread that watches for hangs knows of the run.
#[derive(Debug, Default)]
struct Present {
    since: Option<Instant>,
    inputs: Vec<Vec<u8>>,
    over: bool,
}

fn watch(target: &'static str, present: &Arc<Mutex<Present>>) {
    let present = Arc::clone(present);
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(Duration::from_millis(500));
            let present = present.lock().expect("nobody panics with it");
            if present.over {
                return;
            }
            if present.since.is_some_and(|since| since.elapsed() > HANG) {
                for input in &present.inputs {
                    eprintln!("{}", told(target, "hang", input));
                }
                std::process::abort();
            }
        }
    });
}

/// A failing input, and how to run it again.
fn told(target: &str, what: &str, input: &[u8]) -> String {
    let hex = input.iter().fold(String::new(), |mut hex, byte| {
        let _infallible = write!(hex, "{byte:02x}");
        hex
    });
    let text = BASE64.encode(input);
    let mut hasher = DefaultHasher::new();
    input.hash(&mut hasher);
    let place = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/fuzz-failures");
    let file = place.join(format!("{target}-{:016x}", hasher.finish()));
    let _best_effort = fs::create_dir_all(&place).and_then(|()| fs::write(&file, input));
    let shown =
        if input.len() <= 4_096 { format!("\n  hex:    {hex}\n  base64: {text}") } else { String::new() };
    format!(
        "{target}: {what}\n  input of {} bytes: {}{shown}\n  again:  scripts/fuzz --target {target} --replay {}",
        input.len(),
        file.display(),
        file.display()
    )
}

struct Run<'a, T: Target> {
    target: &'a mut T,
    /// What has happened so far, one bit each.
    map: Vec<u64>,
    /// How many of them are set.
    events: usize,
    inputs: Vec<Vec<u8>>,
    committed: usize,
    present: Arc<Mutex<Present>>,
    slowest: Duration,
    patience: Duration,
}

/// Runs a target as the plan and the environment say; panics with the input that broke a promise.
pub(crate) fn drive<T: Target>(target: &mut T, plan: Plan) {
    let settings = Settings::read();
    let present = Arc::default();
    watch(T::NAME, &present);
    let mut run = Run {
        target,
        map: vec![0; MAP / 64],
        events: 0,
        inputs: Vec::new(),
        committed: 0,
        present: Arc::clone(&present),
        slowest: Duration::ZERO,
        patience: T::PATIENCE * settings.slowness,
    };
    run.all(&settings, plan);
    present.lock().expect("nobody panics with it").over = true;
}

impl<T: Target> Run<'_, T> {
    fn all(&mut self, settings: &Settings, plan: Plan) {
        if let Some(input) = &settings.replay {
            let new = self.batch(std::slice::from_ref(input));
            say(&format!(
                "{}: the input of {} bytes keeps every promise ({new} events)",
                T::NAME,
                input.len()
            ));
            return;
        }
        let corpus = committed(T::NAME);
        assert!(!corpus.is_empty(), "{}: no corpus", T::NAME);
        let replayed = corpus.len();
        for chunk in corpus.chunks(T::AT_ONCE) {
            self.batch(&chunk.iter().map(|(_, input)| input.clone()).collect::<Vec<_>>());
        }
        self.inputs = corpus.into_iter().map(|(_, input)| input).collect();
        self.committed = self.inputs.len();

        let mut rng = Rng::with_seed(settings.seed);
        let limit = settings.minutes.map(|minutes| Duration::from_secs_f64(minutes * 60.0));
        let runs = settings.runs.unwrap_or(if limit.is_some() { u64::MAX } else { plan.runs });
        let (start, before) = (Instant::now(), resident());
        let (mut done, mut spoke, mut peak) = (0, start, before);
        while done < runs && limit.is_none_or(|limit| start.elapsed() < limit) {
            let inputs: Vec<_> = (0..T::AT_ONCE).map(|_| self.next(&mut rng)).collect();
            done += inputs.len() as u64;
            if self.batch(&inputs) > 0 {
                let fresh = std::mem::take(&mut self.present.lock().expect("nobody panics with it").inputs);
                self.keep(&mut rng, fresh, settings);
            }
            if spoke.elapsed() > Duration::from_secs(10) || done.is_multiple_of(50_000) {
                peak = peak.max(resident());
                assert!(peak < MEMORY_LIMIT, "{}: {peak} bytes resident after {done} runs", T::NAME);
            }
            if spoke.elapsed() > Duration::from_secs(10) {
                spoke = Instant::now();
                self.say(done, start.elapsed(), settings.seed, before, peak);
            }
        }
        peak = peak.max(resident());
        self.say(done, start.elapsed(), settings.seed, before, peak);
        say(&format!("{}: done, {replayed} inputs of the corpus and {done} new ones", T::NAME));
    }

    #[expect(clippy::cast_precision_loss, reason = "for people")]
    fn say(&self, done: u64, took: Duration, seed: u64, before: u64, peak: u64) {
        say(&format!(
            "{}: {done} runs in {:.1} s ({:.0}/s), seed {seed}, {} events, {} inputs kept, slowest {:.1} ms, resident {} MiB, at most {}, {} at first",
            T::NAME,
            took.as_secs_f64(),
            done as f64 / took.as_secs_f64().max(0.001),
            self.events,
            self.inputs.len(),
            self.slowest.as_secs_f64() * 1_000.0,
            resident() >> 20,
            peak >> 20,
            before >> 20,
        ));
    }

    /// The next input: a few mutations away from one that is kept, newer ones first.
    fn next(&self, rng: &mut Rng) -> Vec<u8> {
        let pick = |rng: &mut Rng| {
            let from = if rng.bool() { self.inputs.len() - self.inputs.len().div_ceil(4) } else { 0 };
            rng.usize(from..self.inputs.len())
        };
        let mut input = self.inputs[pick(rng)].clone();
        for _ in 0..=rng.usize(0..4).min(rng.usize(0..4)) {
            let other = pick(rng);
            input = self.target.mutate(rng, &input, &self.inputs[other]);
        }
        input.truncate(T::LARGEST);
        input
    }

    fn keep(&mut self, rng: &mut Rng, inputs: Vec<Vec<u8>>, settings: &Settings) {
        for input in inputs {
            if let Some(keep) = &settings.keep {
                let mut hasher = DefaultHasher::new();
                input.hash(&mut hasher);
                let _best_effort = fs::create_dir_all(keep)
                    .and_then(|()| fs::write(keep.join(format!("{:016x}", hasher.finish())), &input));
            }
            if self.inputs.len() < self.committed + KEPT {
                self.inputs.push(input);
            } else {
                let place = rng.usize(self.committed..self.inputs.len());
                self.inputs[place] = input;
            }
        }
    }

    /// Runs inputs; answers how many events were new. What is new is left in `present`.
    fn batch(&mut self, inputs: &[Vec<u8>]) -> usize {
        let start = Instant::now();
        {
            let mut present = self.present.lock().expect("nobody panics with it");
            present.since = Some(start);
            present.inputs = inputs.to_vec();
        }
        let outcomes = self.target.run(inputs);
        let took = start.elapsed();
        self.slowest = self.slowest.max(took);
        let (mut new, mut fresh) = (0, Vec::new());
        for (input, (happened, result)) in inputs.iter().zip(outcomes) {
            if let Err(what) = result {
                // Said at once: making it smaller takes a while, and may meet something else.
                say(&told(T::NAME, &what, input));
                let (small, what) = self.shrunk(input, what);
                panic!("{}", told(T::NAME, &what, &small));
            }
            let mut count = 0;
            for event in happened.0 {
                let bit = usize::try_from(event % MAP as u64).unwrap_or_default();
                let word = &mut self.map[bit / 64];
                count += usize::from(*word & 1 << (bit % 64) == 0);
                *word |= 1 << (bit % 64);
            }
            if count > 0 {
                fresh.push(input.clone());
                new += count;
            }
        }
        self.events += new;
        if took > self.patience {
            self.blame_the_slow(inputs);
        }
        if let Err(what) = self.target.check() {
            self.blame(inputs, &what);
        }
        let mut present = self.present.lock().expect("nobody panics with it");
        present.since = None;
        present.inputs = fresh;
        new
    }

    /// A busy machine makes anything slow, so only what is slow three times over is blamed.
    fn blame_the_slow(&mut self, inputs: &[Vec<u8>]) {
        for input in inputs {
            let slow = (0..3).all(|_| {
                self.present.lock().expect("nobody panics with it").since = Some(Instant::now());
                let start = Instant::now();
                self.target.run(std::slice::from_ref(input));
                start.elapsed() > self.patience
            });
            assert!(!slow, "{}", told(T::NAME, "too slow", input));
        }
    }

    /// Something broke while these inputs ran: finds the one that does it alone.
    fn blame(&mut self, inputs: &[Vec<u8>], what: &str) -> ! {
        for input in inputs {
            self.target.run(std::slice::from_ref(input));
            if let Err(what) = self.target.check() {
                panic!("{}", told(T::NAME, &what, input));
            }
        }
        let all: Vec<String> = inputs.iter().map(|input| told(T::NAME, "one of several", input)).collect();
        panic!("{what}, and no input does it alone\n{}", all.join("\n"));
    }

    /// The smallest part of `input` found that still breaks a promise, and what it breaks.
    fn shrunk(&mut self, input: &[u8], what: String) -> (Vec<u8>, String) {
        let (mut small, mut what) = (input.to_vec(), what);
        let mut left = if T::AT_ONCE > 1 { SHRINKING / 400 } else { SHRINKING };
        let mut size = small.len().next_power_of_two();
        while size > 0 && left > 0 {
            let mut at = 0;
            while at < small.len() && left > 0 {
                left -= 1;
                self.present.lock().expect("nobody panics with it").since = Some(Instant::now());
                let mut tried = small.clone();
                tried.drain(at..(at + size).min(small.len()));
                match self.target.run(std::slice::from_ref(&tried)).pop() {
                    Some((_, Err(broken))) => (small, what) = (tried, broken),
                    _ => at += size,
                }
            }
            size /= 2;
        }
        (small, what)
    }
}

/// Past the test runner's capture: a long run is watched while it runs.
fn say(line: &str) {
    let _best_effort = writeln!(std::io::stderr(), "{line}");
}
