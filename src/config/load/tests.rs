use std::time::Duration;

use tempfile::TempDir;

use super::*;
use crate::config::{Ephemeral, LogFormat};

/// A file, an environment and flags.
#[derive(Default)]
struct Given {
    folder: Option<TempDir>,
    overrides: Overrides,
    env: Vec<(String, String)>,
}

impl Given {
    fn file(mut self, text: &str) -> Self {
        self.overrides.config = Some(self.write("server.toml", text));
        self
    }

    fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The environment variable `name` with the path of a file that holds `text`.
    fn env_file(mut self, name: &str, text: &str) -> Self {
        let path = self.write(name, text).display().to_string();
        self.env(name, &path)
    }

    fn write(&mut self, name: &str, text: &str) -> PathBuf {
        let folder = self.folder.get_or_insert_with(|| TempDir::new().unwrap());
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    fn load(&self) -> Result<Loaded, ConfigError> {
        Config::load_from(&self.overrides, self.env.iter().cloned())
    }

    fn config(&self) -> Config {
        self.load().unwrap().config
    }

    fn agents_token(&self) -> String {
        self.config().agents.token.unwrap().expose().to_owned()
    }

    /// The message of the refusal, one sentence without line breaks.
    fn refusal(&self) -> String {
        let message = self.load().unwrap_err().to_string();
        assert!(!message.contains('\n'), "{message}");
        message
    }
}

fn file(text: &str) -> Given {
    Given::default().file(text)
}

fn env(name: &str, value: &str) -> Given {
    Given::default().env(name, value)
}

fn has(message: &str, words: &[&str]) {
    for word in words {
        assert!(message.contains(word), "{word:?} is missing in: {message}");
    }
}

#[test]
fn nothing_given_is_the_defaults_and_no_warning() {
    let loaded = Given::default().load().unwrap();
    assert_eq!(loaded.warnings, Vec::<String>::new());
    assert_eq!(loaded.config.agents.listen, "127.0.0.1:4320".parse().unwrap());
    assert_eq!(loaded.config.agents.max_message_size, 67_108_864);
    assert_eq!(loaded.config.store.url.expose(), "sqlite://opamp-server.db");
    assert_eq!(loaded.config.heartbeat.timeout, Duration::from_mins(1));
    assert_eq!(loaded.config.log.format, None);
}

#[test]
fn every_key_can_be_set_in_the_file_and_in_the_environment() {
    let all = [
        ("agents", "listen", "127.0.0.1:1"),
        ("agents", "path", "/x"),
        ("agents", "token", "t"),
        ("agents", "allow_anonymous", "true"),
        ("agents", "max_connections", "2"),
        ("agents", "max_connects_per_second", "7"),
        ("agents", "max_message_size", "1KiB"),
        ("agents", "max_inflight", "2MiB"),
        ("agents", "max_per_link", "3"),
        ("operators", "listen", "127.0.0.1:2"),
        ("operators", "token", "u"),
        ("operators", "allow_anonymous", "true"),
        ("store", "url", "sqlite://x.db"),
        ("store", "listen_url", "postgres://x"),
        ("store", "max_connections", "4"),
        ("store", "flush_interval", "1s"),
        ("heartbeat", "interval", "2s"),
        ("heartbeat", "timeout", "3s"),
        ("heartbeat", "check_interval", "4s"),
        ("sweep", "interval", "5s"),
        ("sweep", "stale_after", "6s"),
        ("sweep", "ephemeral", "all"),
        ("retention", "history", "30d"),
        ("node", "name", "n"),
        ("node", "lease", "7s"),
        ("shutdown", "drain", "8s"),
        ("log", "level", "debug"),
        ("log", "format", "json"),
    ];
    let mut lines = Vec::new();
    let mut by_env = Given::default();
    for (section, name, value) in all {
        let plain = value.parse::<u64>().is_ok() || value == "true";
        let value_text = if plain { value.to_owned() } else { format!("{value:?}") };
        lines.push(format!("{section}.{name} = {value_text}\n"));
        by_env = by_env.env(&format!("OPAMP_{section}_{name}").to_uppercase(), value);
    }
    let by_file = file(&lines.concat()).load().unwrap();
    let by_env = by_env.load().unwrap();
    assert_eq!(format!("{:?}", by_file.config), format!("{:?}", by_env.config));
    assert_eq!(by_env.config.sweep.ephemeral, Ephemeral::All);
    assert_eq!(by_env.config.log.format, Some(LogFormat::Json));
    assert!(!by_file.render().contains("# default"), "{}", by_file.render());
    assert!(!by_env.render().contains("# default"), "{}", by_env.render());
}

#[test]
fn flags_win_over_the_environment_and_that_over_the_file() {
    let given =
        file("[agents]\nlisten = '127.0.0.1:1'\nmax_per_link = 7\n[operators]\nlisten = '127.0.0.1:2'");
    assert_eq!(given.config().agents.listen.port(), 1);
    let mut given = given.env("OPAMP_AGENTS_LISTEN", "127.0.0.1:3");
    assert_eq!(given.config().agents.listen.port(), 3);
    given.overrides.agents_listen = Some("127.0.0.1:4".to_owned());
    let config = given.config();
    assert_eq!(config.agents.listen.port(), 4);
    assert_eq!(config.agents.max_per_link, 7, "a section is not replaced as a whole");
    assert_eq!(config.operators.listen.port(), 2);
}

#[test]
fn a_wrong_value_that_a_later_layer_replaces_does_not_count() {
    assert_eq!(file("agents.path = 'x'").env("OPAMP_AGENTS_PATH", "/x").config().agents.path, "/x");
}

#[test]
fn a_token_that_looks_like_something_else_is_a_text() {
    for token in ["123456", "true", "a,b", "[a, b]", "1e5", "007", "0x1F", "null", "\"x\""] {
        assert_eq!(env("OPAMP_AGENTS_TOKEN", token).agents_token(), token);
        assert_eq!(file(&format!("[agents]\ntoken = '{token}'")).agents_token(), token);
    }
    for token in ["123456", "-7", "true", "1.5", "2026-01-31"] {
        assert_eq!(file(&format!("[agents]\ntoken = {token} # mine")).agents_token(), token);
    }
}

#[test]
fn a_bare_token_that_reading_would_change_must_be_quoted() {
    for token in ["0x1F", "1_000", "1.50", "+5", "['a']", "{ a = 'b' }"] {
        let refusal = file(&format!("[agents]\ntoken = {token}\n[store]\nmax_connections = 31")).refusal();
        has(&refusal, &["agents.token = ***", "in quotes"]);
    }
}

#[test]
fn an_empty_or_unsendable_token_is_refused() {
    has(
        &env("OPAMP_AGENTS_TOKEN", "").refusal(),
        &["agents.token = \"\"", "OPAMP_AGENTS_TOKEN", "remove it"],
    );
    has(&file("operators.token = ''").refusal(), &["operators.token", "remove it"]);
    has(
        &Given::default().env_file("OPAMP_AGENTS_TOKEN_FILE", "\n").refusal(),
        &["agents.token", "remove it"],
    );
    has(&env("INTERNAL_SERVICE_TOKEN", "").refusal(), &["INTERNAL_SERVICE_TOKEN"]);
    for token in ["höher", "hunter\n2", " hunter", "hunter\u{7f}"] {
        let refusal = env("OPAMP_AGENTS_TOKEN", token).refusal();
        has(&refusal, &["visible ASCII", "***"]);
        assert!(!refusal.contains(token));
    }
}

#[test]
fn an_unknown_key_is_an_error_that_names_it() {
    has(&file("agent = 1").refusal(), &["the key agent in", "server.toml", "remove it"]);
    has(&file("[agents]\ntokn = 'hunter2'").refusal(), &["the key agents.tokn in"]);
    has(&file("[operators]\nmax_connections = 1").refusal(), &["operators.max_connections"]);
    has(&file("[agents.tls]\nkey = 'x'").refusal(), &["agents.tls"]);
    has(&file("\"agents.listen\" = 'x'").refusal(), &["the key agents.listen in"]);
    has(&file("Agents.listen = 'x'").refusal(), &["the key Agents in"]);
    has(&file("agents.listen_file = 'x'").refusal(), &["agents.listen_file"]);
    assert!(!file("[agents]\ntokn = 'hunter2'").refusal().contains("hunter2"));
}

#[test]
fn a_section_must_be_a_table() {
    has(&file("agents = 5").refusal(), &["agents = 5", "[agents]"]);
    has(&file("[[agents]]\nlisten = 'x'").refusal(), &["agents = ", "[agents]"]);
}

#[test]
fn a_value_of_the_wrong_type_names_its_key_and_the_cure() {
    for (text, words) in [
        ("agents.listen = 4320", ["agents.listen = 4320", "\"127.0.0.1:4320\""]),
        ("agents.allow_anonymous = 1", ["agents.allow_anonymous = 1", "true or false"]),
        ("agents.allow_anonymous = 'true'", ["agents.allow_anonymous = true", "without quotes"]),
        ("agents.max_connections = '5'", ["agents.max_connections = 5", "whole number"]),
        ("agents.max_connections = 1.5", ["agents.max_connections = 1.5", "whole number"]),
        ("agents.max_connections = true", ["agents.max_connections = true", "whole number"]),
        ("node.name = 5", ["node.name = 5", "host name"]),
        ("store.url = 5", ["store.url = ***", "sqlite://"]),
        ("heartbeat.timeout = 60", ["heartbeat.timeout = 60", "60s"]),
        ("sweep.ephemeral = 'Some'", ["sweep.ephemeral = \"Some\"", "marked"]),
        ("log.format = 'xml'", ["log.format = \"xml\"", "human"]),
        ("agents.token_file = 5", ["agents.token_file = 5", "path of a file"]),
    ] {
        has(&file(text).refusal(), &words);
    }
    has(
        &env("OPAMP_AGENTS_MAX_CONNECTIONS", "many").refusal(),
        &["agents.max_connections = \"many\" (environment OPAMP_AGENTS_MAX_CONNECTIONS)", "from 1 to"],
    );
    has(&env("OPAMP_AGENTS_ALLOW_ANONYMOUS", "yes").refusal(), &["true or false"]);
    has(&env("OPAMP_AGENTS_MAX_CONNECTIONS", "").refusal(), &["whole number"]);
}

#[test]
fn durations_and_sizes_are_read_with_their_units() {
    let config = file("heartbeat = { timeout = '500ms', interval = '100ms' }\nsweep.stale_after = '1h 30m'")
        .env("OPAMP_AGENTS_MAX_MESSAGE_SIZE", "1.5 KiB")
        .env("OPAMP_SHUTDOWN_DRAIN", "0s")
        .config();
    assert_eq!(config.heartbeat.timeout, Duration::from_millis(500));
    assert_eq!(config.sweep.stale_after, Duration::from_mins(90));
    assert_eq!(config.agents.max_message_size, 1536);
    assert_eq!(config.shutdown.drain, Duration::ZERO);
    assert_eq!(file("agents.max_message_size = 4096").config().agents.max_message_size, 4096);
    assert_eq!(file("shutdown.drain = 0").config().shutdown.drain, Duration::ZERO);
}

#[test]
fn bad_durations_and_sizes_are_refused() {
    for text in ["", "10", "ten", "-1s", "1 fortnight", "0s", "1ms", "2years", "99999999999999999999s"] {
        has(&env("OPAMP_HEARTBEAT_TIMEOUT", text).refusal(), &["heartbeat.timeout = ", "100ms to 365d"]);
    }
    for text in ["", "0", "many", "-1", "64 MiBs", "2GiB", "99999999999EiB"] {
        has(
            &env("OPAMP_AGENTS_MAX_MESSAGE_SIZE", text).refusal(),
            &["agents.max_message_size = ", "1B to 1GiB"],
        );
    }
}

#[test]
fn zero_is_refused_where_it_makes_no_sense() {
    for key in ["agents.max_connections", "agents.max_per_link", "store.max_connections"] {
        let refusal = file(&format!("{key} = 0")).refusal();
        has(&refusal, &[&format!("{key} = 0 (file "), "server.toml", "from 1 to"]);
    }
    for key in [
        "store.flush_interval",
        "heartbeat.interval",
        "heartbeat.check_interval",
        "sweep.interval",
        "node.lease",
    ] {
        has(&file(&format!("{key} = '0s'")).refusal(), &[&format!("{key} = \"0s\""), "ms to 365d"]);
    }
}

#[test]
fn unknown_variables_are_one_warning_that_names_them_all() {
    let loaded = env("OPAMP_SERVER_SERVICE_HOST", "10.0.0.1")
        .env("OPAMP_PORT", "tcp://10.0.0.1:4320")
        .env("OPAMP_AGENTS_TOKN", "hunter2")
        .env("OPAMP_AGENTS_PORT_4320_TCP", "x")
        .env("HOME", "/root")
        .env("opamp_agents_token", "x")
        .load()
        .unwrap();
    let [warning] = loaded.warnings.as_slice() else { panic!("{:?}", loaded.warnings) };
    has(warning, &["OPAMP_AGENTS_PORT_4320_TCP, OPAMP_AGENTS_TOKN, OPAMP_PORT, OPAMP_SERVER_SERVICE_HOST;"]);
    assert!(!warning.contains("hunter2"));
    assert!(loaded.config.agents.token.is_none());
}

#[test]
fn a_secret_can_come_from_a_file_without_its_last_newline() {
    for (text, token) in [("abc\n", "abc"), ("abc\r\n", "abc"), ("abc", "abc"), ("a b", "a b")] {
        assert_eq!(Given::default().env_file("OPAMP_AGENTS_TOKEN_FILE", text).agents_token(), token);
    }
    let given = Given::default().env_file("OPAMP_STORE_URL_FILE", "postgres://me:pw@db/fleet\n");
    assert_eq!(given.config().store.url.expose(), "postgres://me:pw@db/fleet");
    let mut given = Given::default();
    let path = given.write("operators", "123\n").display().to_string();
    let given = given.file(&format!("[operators]\ntoken_file = '{path}'"));
    assert_eq!(given.config().operators.token.unwrap().expose(), "123");
    let rendered = given.load().unwrap().render();
    has(&rendered, &[&format!("token = \"***\" # file {path}, named by file "), "server.toml"]);
}

#[test]
fn both_forms_of_a_secret_are_an_error_in_whatever_layers() {
    let one = "agents.token = 'a'\nagents.token_file = '/x'";
    has(&file(one).refusal(), &["agents.token is set", "agents.token_file is set too", "remove one"]);
    let refusal = file("agents.token = 'hunter2'").env("OPAMP_AGENTS_TOKEN_FILE", "/x").refusal();
    has(&refusal, &["server.toml", "environment OPAMP_AGENTS_TOKEN_FILE"]);
    assert!(!refusal.contains("hunter2"));
    has(&file("store.url_file = '/x'").env("OPAMP_STORE_URL", "y").refusal(), &["store.url is set"]);
    let mut given = env("OPAMP_STORE_URL_FILE", "/x");
    given.overrides.store_url = Some("sqlite://x.db".to_owned());
    has(&given.refusal(), &["flag --store-url", "OPAMP_STORE_URL_FILE"]);
}

#[test]
fn an_unreadable_file_is_named_with_its_cure() {
    has(
        &env("OPAMP_AGENTS_TOKEN_FILE", "/nowhere/token").refusal(),
        &[
            "agents.token_file = /nowhere/token",
            "OPAMP_AGENTS_TOKEN_FILE",
            "No such file",
            "correct the path",
        ],
    );
    let mut given = Given::default();
    given.overrides.config = Some(PathBuf::from("/nowhere/server.toml"));
    has(&given.refusal(), &["/nowhere/server.toml", "--config"]);
}

#[test]
fn a_broken_file_is_an_error_with_its_line_and_without_its_text() {
    let refusal = file("[agents]\ntoken = hunter2\n").refusal();
    has(&refusal, &["server.toml", "line 2"]);
    assert!(!refusal.contains("hunter2"), "{refusal}");
    let refusal = file("[agents]\ntoken = 'hunter2\n").refusal();
    assert!(!refusal.contains("hunter2"), "{refusal}");
    let refusal = file("[agents]\ntoken = 'a'\ntoken = 'hunter2'\n").refusal();
    has(&refusal, &["duplicate key"]);
    assert!(!refusal.contains("hunter2"), "{refusal}");
    has(&file("agents.token = 123456789012345678901234567890").refusal(), &["server.toml", "quotes"]);
}

#[test]
fn database_url_counts_only_where_the_store_is_set_nowhere() {
    let url = |given: &Given| given.config().store.url.expose().to_owned();
    let other = || env("DATABASE_URL", "postgres://other/db");
    assert_eq!(url(&other()), "postgres://other/db");
    assert_eq!(url(&other().file("store.url = 'sqlite://f.db'")), "sqlite://f.db");
    assert_eq!(url(&other().env("OPAMP_STORE_URL", "sqlite://e.db")), "sqlite://e.db");
    assert_eq!(url(&other().env_file("OPAMP_STORE_URL_FILE", "sqlite://s.db")), "sqlite://s.db");
    let mut flagged = other();
    flagged.overrides.store_url = Some("sqlite://flag.db".to_owned());
    assert_eq!(url(&flagged), "sqlite://flag.db");
}

#[test]
fn internal_service_token_is_the_older_name_of_agents_token() {
    let older = || env("INTERNAL_SERVICE_TOKEN", "older");
    let config = older().config();
    assert_eq!(config.agents.token.unwrap().expose(), "older");
    assert!(config.operators.token.is_none());
    assert_eq!(older().env("OPAMP_AGENTS_TOKEN", "new").agents_token(), "new");
    assert_eq!(older().file("agents.token = 'file'").agents_token(), "file");
    assert_eq!(older().env_file("OPAMP_AGENTS_TOKEN_FILE", "own").agents_token(), "own");
    has(&older().load().unwrap().render(), &["token = \"***\" # environment INTERNAL_SERVICE_TOKEN"]);
}

#[test]
fn a_listener_others_can_reach_needs_its_own_token_or_permission() {
    for listen in ["0.0.0.0:4320", "[::]:4320", "10.0.0.1:4320", "[::ffff:10.0.0.1]:4320", "0.0.0.0:0"] {
        let open = || env("OPAMP_AGENTS_LISTEN", listen);
        has(&open().refusal(), &["agents.listen = ", "set agents.token", "agents.allow_anonymous = true"]);
        has(&open().env("OPAMP_OPERATORS_TOKEN", "t").refusal(), &["set agents.token"]);
        has(&open().env("OPAMP_OPERATORS_ALLOW_ANONYMOUS", "true").refusal(), &["set agents.token"]);
        assert!(open().env("OPAMP_AGENTS_TOKEN", "t").load().is_ok());
        assert!(open().env("OPAMP_AGENTS_ALLOW_ANONYMOUS", "true").load().is_ok());
    }
    let open = || file("operators.listen = '0.0.0.0:4321'").env("OPAMP_AGENTS_ALLOW_ANONYMOUS", "true");
    has(&open().refusal(), &["operators.listen = 0.0.0.0:4321", "operators.allow_anonymous = true"]);
    assert!(open().env("OPAMP_OPERATORS_TOKEN", "t").load().is_ok());
}

#[test]
fn loopback_needs_no_token_in_any_spelling() {
    for listen in ["127.0.0.1:1", "127.8.8.8:1", "[::1]:1", "[::ffff:127.0.0.1]:1", "[::1]:0"] {
        assert!(env("OPAMP_AGENTS_LISTEN", listen).load().is_ok(), "{listen}");
    }
    for listen in ["localhost:1", "127.0.0.1", "::1:1", "127.0.0.1:70000", ":1", "http://127.0.0.1:1"] {
        has(&env("OPAMP_AGENTS_LISTEN", listen).refusal(), &["agents.listen = ", listen, "[::1]:4320"]);
    }
}

#[test]
fn the_listeners_must_differ() {
    let same = env("OPAMP_AGENTS_LISTEN", "127.0.0.1:5").env("OPAMP_OPERATORS_LISTEN", "127.0.0.1:5");
    has(&same.refusal(), &["127.0.0.1:5", "another port"]);
    let free = env("OPAMP_AGENTS_LISTEN", "127.0.0.1:0").env("OPAMP_OPERATORS_LISTEN", "127.0.0.1:0");
    assert!(free.load().is_ok());
}

#[test]
fn paths_names_and_filters_must_be_able_to_work() {
    for path in ["", "v1/opamp", "/v1 opamp", "/v1?x=1", "/ä"] {
        has(&env("OPAMP_AGENTS_PATH", path).refusal(), &["agents.path = ", "/v1/opamp"]);
    }
    has(&env("OPAMP_NODE_NAME", " ").refusal(), &["node.name = \" \"", "remove it"]);
    has(&env("OPAMP_STORE_URL", "").refusal(), &["store.url = \"\"", "remove it"]);
    for level in ["", "info, sqlx=off", "inof", "info,loud", "info,hyper=loud", "="] {
        has(&env("OPAMP_LOG_LEVEL", level).refusal(), &["log.level = ", "trace"]);
    }
    for level in ["off", "WARN", "info,hyper=warn", "[link{id=7}]=trace"] {
        assert_eq!(env("OPAMP_LOG_LEVEL", level).config().log.level, level);
    }
}

#[test]
fn a_timeout_within_the_interval_is_a_warning() {
    let loaded = env("OPAMP_HEARTBEAT_TIMEOUT", "30s").load().unwrap();
    assert_eq!(loaded.warnings.len(), 1);
    has(&loaded.warnings[0], &["heartbeat.timeout (30s)", "heartbeat.interval (30s)"]);
}

#[test]
fn a_node_is_named_after_host_and_port_unless_it_has_a_name() {
    let config = Given::default().config();
    let name = config.node.node_name(4320);
    assert!(name.len() > ":4320".len() && name.ends_with(":4320"), "{name}");
    assert_eq!(env("OPAMP_NODE_NAME", "one").config().node.node_name(4320), "one");
}

#[test]
fn no_secret_is_printed_by_debug_or_render() {
    let mut given = file("agents.token = 'hunter2'\noperators.token = 'hunter3'");
    given.overrides.store_url = Some("postgres://me:hunter4@db:5432/fleet".to_owned());
    let loaded = given.load().unwrap();
    let printed = format!("{:?} {:#?} {loaded:?} {}", given.overrides, loaded.config, loaded.render());
    assert!(!printed.contains("hunter"), "{printed}");
    has(&loaded.render(), &["url = \"postgres://me:***@db:5432/fleet\" # flag --store-url"]);
}

#[test]
fn the_rendered_configuration_tells_origins_and_loads_again() {
    let given = file("[node]\nname = 'a \"b\" \\ c'\n[agents]\nmax_message_size = 1537")
        .env("OPAMP_SWEEP_EPHEMERAL", "none")
        .env("OPAMP_HEARTBEAT_TIMEOUT", "1500ms")
        .env("OPAMP_HEARTBEAT_INTERVAL", "1s");
    let rendered = given.load().unwrap().render();
    has(
        &rendered,
        &[
            "[agents]\nlisten = \"127.0.0.1:4320\" # default\n",
            "# token is not set # default\n",
            "max_message_size = \"1537B\" # file ",
            "ephemeral = \"none\" # environment OPAMP_SWEEP_EPHEMERAL\n",
            "timeout = \"1500ms\" # environment",
            "\n\n[log]\nlevel = \"info\" # default\n# format is not set # default\n",
        ],
    );
    let again = file(&rendered);
    assert_eq!(format!("{:?}", again.config()), format!("{:?}", given.config()));
}
