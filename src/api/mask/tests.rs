use proptest::prelude::*;
use serde_json::json;

use super::*;

/// Each text and what is shown of it.
fn shows(cases: &[(&str, &str)]) {
    for (text, shown) in cases {
        assert_eq!(mask(text), *shown, "of {text:?}");
    }
}

/// Texts that stay as they are.
fn stays(texts: &[&str]) {
    for text in texts {
        assert_eq!(mask(text), *text);
    }
}

#[test]
fn scalars_under_a_secret_key() {
    shows(&[
        ("token: abc", "token: ***"),
        ("a: 1\r\ntoken: abc\r\nb: 2\r\n", "a: 1\r\ntoken: ***\r\nb: 2\r\n"),
        ("  DB_Password :  abc def  \nx: y", "  DB_Password :  ***  \nx: y"),
        ("\"api-key\": \"abc\"", "\"api-key\": \"***\""),
        ("'x-api-key': 'it''s' # note", "'x-api-key': '***' # note"),
        ("- access_key: abc\n- b: c", "- access_key: ***\n- b: c"),
        ("- - privateKey: abc", "- - privateKey: ***"),
        ("headers:\n  Authorization: Bearer abc\n  X: y", "headers:\n  Authorization: ***\n  X: y"),
        ("Set-Cookie: a=b; c=d", "Set-Cookie: ***"),
        ("token: \"a\\\"b: c\"", "token: \"***\""),
        ("token: abc # was def", "token: ***"),
        ("token: 12", "token: ***"),
        ("? token\n: abc", "? token\n: ***"),
        ("token: \"\"\nx: y", "token: \"\"\nx: y"),
        ("tökén_token: äöü", "tökén_token: ***"),
    ]);
}

#[test]
fn assignments() {
    shows(&[
        ("token = abc\nx = y", "token = ***\nx = y"),
        ("TOKEN=abc#def ghi\nX=y", "TOKEN=***\nX=y"),
        ("export API_KEY='abc def'\n", "export API_KEY='***'\n"),
        ("password=\"a\\\"b\"", "password=\"***\""),
        ("password=\"abc\"def", "password=\"***\"***"),
        ("password:abc", "password:***"),
        ("password => \"abc\"", "password => \"***\""),
        ("token = a\\\n  b\\\nc\nx = y", "token = ***\n  ***\n***\nx = y"),
        ("token = abc\n  def==\nx = y", "token = ***\n  ***\nx = y"),
        ("token = \"abc\"\n  other = \"x\"", "token = \"***\"\n  other = \"x\""),
        ("token = abc\n  other = x", "token = ***\n  other = x"),
        ("headers.\"Authorization\" = \"abc\"", "headers.\"Authorization\" = \"***\""),
        ("# token = abc", "# token = ***"),
        ("; password = abc", "; password = ***"),
    ]);
}

#[test]
fn sections() {
    shows(&[
        ("[a.authorization]\nx = \"abc\"\n[b]\nx = \"y\"", "[a.authorization]\nx = \"***\"\n[b]\nx = \"y\""),
        (
            "[OUTPUT]\n    Name http\n    http_Passwd  abc\n",
            "[OUTPUT]\n    Name http\n    http_Passwd  ***\n",
        ),
        ("token = \"\"\"\nabc\ndef\"\"\"\nx = 1", "token = \"\"\"\n***\n***\"\"\"\nx = 1"),
        ("tokens = [\n  \"a\", # b\n  'c',\n]\nx = 1", "tokens = [\n  \"***\", # b\n  '***',\n]\nx = 1"),
        ("x = { token = \"a,b\", y = 1 }", "x = { token = \"***\", y = 1 }"),
        ("x = {\n  token = 1\n  y = 2\n}", "x = {\n  token = ***\n  y = 2\n}"),
    ]);
}

#[test]
fn nested_below_a_secret_key() {
    shows(&[
        (
            "authorization:\n  scheme: Basic\n  deep:\n    x: \"y\"\nother: z",
            "authorization:\n  scheme: ***\n  deep:\n    x: \"***\"\nother: z",
        ),
        ("tokens:\n- a\n- b: c\nx: y", "tokens:\n- ***\n- b: ***\nx: y"),
        ("tokens:\n  - a\n\n  - 'b: c'\nx:\n  - y", "tokens:\n  - ***\n\n  - '***'\nx:\n  - y"),
        ("- token:\n    - a\n  x: y", "- token:\n    - ***\n  x: y"),
        ("tokens:\n- |\n  a: b\n  c\nx: y", "tokens:\n- |\n  ***\n  ***\nx: y"),
        ("credentials: # two\n  user: a\n  pw: b=c", "credentials: ***\n  user: ***\n  pw: ***"),
        ("secret:\n  a:\n    b: c\n  d: [e, {f: g}]", "secret:\n  a:\n    b: ***\n  d: [***, {f: ***}]"),
    ]);
}

#[test]
fn scalars_of_many_lines() {
    shows(&[
        ("key_pem: |\n  abc: x\n\n    def\nx: y", "key_pem: |\n  ***\n\n    ***\nx: y"),
        ("- token: >-  # folded\n    abc\n  x: y", "- token: >-  # folded\n    ***\n  x: y"),
        ("token: abc\n  def: ghi\nx: y", "token: ***\n  ***\nx: y"),
        ("token: \"abc\n  def\"\nx: y", "token: \"***\n  ***\"\nx: y"),
        ("token: 'abc\nx: y", "token: ***\nx: y"),
        ("script: |\n  token: abc\n  x: y", "script: |\n  token: ***\n  x: y"),
    ]);
}

#[test]
fn brackets() {
    shows(&[
        ("{token: abc, other: x}", "{token: ***, other: x}"),
        ("a: {token: abc, other: x} # b", "a: {token: ***, other: x} # b"),
        ("{\"token\":\"abc\",\"x\":1}", "{\"token\":\"***\",\"x\":1}"),
        ("{\"token\":123,\"x\":true}", "{\"token\":***,\"x\":true}"),
        ("{token:\"abc\",x:\"y\"}", "{token:\"***\",x:\"y\"}"),
        ("{x:\"y}\",token:\"abc\"}", "{x:\"y}\",token:\"***\"}"),
        (
            "{\n  \"tokens\": [\"a\", {\"b\": 1}],\n  \"x\": 1\n}",
            "{\n  \"tokens\": [\"***\", {\"b\": ***}],\n  \"x\": 1\n}",
        ),
        (
            "{\"authorization\":\n{\"scheme\":\"a\",\"b\":[[\"c\"]]},\"x\":\"}\"}",
            "{\"authorization\":\n{\"scheme\":\"***\",\"b\":[[\"***\"]]},\"x\":\"}\"}",
        ),
        ("{\"a\":\"\\\"\",\"token\":\"b\\\\\"}", "{\"a\":\"\\\"\",\"token\":\"***\"}"),
        (
            "{\n  # don't\n  token: abc,\n  // it's\n  x: y\n}",
            "{\n  # don't\n  token: ***,\n  // it's\n  x: y\n}",
        ),
        ("{\"a\":1}\n{\"token\":\"b\"}", "{\"a\":1}\n{\"token\":\"***\"}"),
        ("token: {a}b", "token: {***}***"),
        ("args: [--token=abc, -v]", "args: [--token=***, -v]"),
    ]);
}

#[test]
fn broken_brackets_and_quotes_hide_all_the_same() {
    for text in [
        "{\"a\": {\"token\": \"hunter2\", \"x",
        "{\"a\": {\"token\": \"hunter2",
        "{\n  \"token\": {\n    \"x\": \"hunter2\",\n    \"y\": [\n      \"hunter2\"",
        "x: [\ntoken: hunter2",
        "x: {\na: {b: c, token: hunter2, d: e}\n",
        "token: [hunter2",
        "token: {hunter2\n  hunter2",
        "a: 'tis\ntoken: hunter2\n",
        "a: \"x\n\ntoken: hunter2",
        "x: |\n  {\nhunter: y\npassword: |\n  hunter2:}\nz: }",
        "tokens: [\n  \"a\",\n  \"hunter2 :",
        "]}token: hunter2",
        "\"token: hunter2",
        "token: \"hunter2\\\"",
        "token: 'hunter2' hunter2",
    ] {
        assert!(!mask(text).contains("hunter2"), "{text:?} shows {:?}", mask(text));
    }
}

#[test]
fn a_value_beside_a_secret_name() {
    shows(&[
        (
            "- name: DB_PASSWORD\n  value: abc\n- name: x\n  value: y",
            "- name: DB_PASSWORD\n  value: ***\n- name: x\n  value: y",
        ),
        ("- value: abc\n  key: Authorization\n", "- value: ***\n  key: Authorization\n"),
        ("- value:\n    a: b\n  key: token", "- value:\n    ***\n  key: token"),
        ("- key: token\n  value:\n    a: b", "- key: token\n  value:\n    a: ***"),
        (
            "[{name: token, value: abc}, {name: x, value: y}]",
            "[{name: token, value: ***}, {name: x, value: y}]",
        ),
        ("{\"value\":{\"a\":\"b\"},\"key\":\"token\"}", "{\"value\":***,\"key\":\"token\"}"),
        ("{\"key\":\"token\",\"value\":{\"a\":\"b\"}}", "{\"key\":\"token\",\"value\":{\"a\":\"***\"}}"),
    ]);
}

#[test]
fn secrets_in_the_midst_of_a_text() {
    shows(&[
        ("run: curl --token=abc -H 'X: y'", "run: curl --token=*** -H 'X: y'"),
        ("- \"Authorization: Bearer abc\"", "- \"Authorization: ***\""),
        ("url: https://h/?api_key=abc&x=y", "url: https://h/?api_key=***&x=y"),
        ("dsn: 'Server=a;Password=b;X=y'", "dsn: 'Server=a;Password=***;X=y'"),
        ("json: '{\"token\":\"abc\",\"x\":1}'", "json: '{\"token\":\"***\",\"x\":1}'"),
        (
            "{\"j\":\"{\\\"token\\\":\\\"abc\\\",\\\"x\\\":1}\"}",
            "{\"j\":\"{\\\"token\\\":\\\"***\\\",\\\"x\\\":1}\"}",
        ),
        ("<a><password>abc</password><b>c</b></a>", "<a><password>***</password><b>c</b></a>"),
        ("<add password=\"abc\" x=\"y\"/>", "<add password=\"***\" x=\"y\"/>"),
        ("\"a\": 1, \"token\": \"abc\", \"x\": 1", "\"a\": 1, \"token\": \"***\", \"x\": 1"),
    ]);
}

#[test]
fn user_info_in_urls() {
    shows(&[
        ("a: https://me:pw@host:1/x", "a: https://***@host:1/x"),
        ("postgres://me:p@w@db/x?y=z", "postgres://***@db/x?y=z"),
        ("see https://abc@host, and http://b:c@d", "see https://***@host, and http://***@d"),
        ("{\"a\":\"http:\\/\\/me:pw@host\\/x\"}", "{\"a\":\"http:\\/\\/***@host\\/x\"}"),
        ("a: redis://:p/w?x#y@host", "a: redis://***@host"),
        ("mongodb://me:pw@h1:1,h2:2/x", "mongodb://***@h1:1,h2:2/x"),
        ("https://me:${env:PW}@host", "https://***@host"),
        ("xx:// //me:pw@host http://u@:1", "xx:// //me:pw@host http://***@:1"),
    ]);
    stays(&[
        "endpoint: http://host:4317/a@b",
        "endpoint: http://[::1]:4317",
        "endpoint: https://${env:HOST}/a@b",
        "endpoint: https://${env:USER}:${env:PW}@host",
        "a: \"http://h:1\", b: c@d",
    ]);
}

#[test]
fn private_keys_anywhere() {
    shows(&[
        (
            "-----BEGIN RSA PRIVATE KEY-----\nabc\ndef=\n-----END RSA PRIVATE KEY-----\n",
            "-----BEGIN RSA PRIVATE KEY-----\n***\n***\n-----END RSA PRIVATE KEY-----\n",
        ),
        ("x: |\n  -----BEGIN PRIVATE KEY-----\n  abc", "x: |\n  -----BEGIN PRIVATE KEY-----\n  ***"),
    ]);
    stays(&["-----BEGIN CERTIFICATE-----\nabc\n-----END CERTIFICATE-----"]);
}

#[test]
fn references_stay() {
    stays(&[
        "token: ${env:TOKEN}",
        "token: \"${env:TOKEN}\"",
        "TOKEN=${TOKEN}",
        "{token: ${env:A}, x: y}",
        "tokens:\n  - ${env:A}${env:B}",
    ]);
    shows(&[
        ("Authorization: Bearer ${env:TOKEN}", "Authorization: *** ${env:TOKEN}"),
        ("token: ${env:TOKEN:-abc}", "token: ***"),
        ("token: ${env:A}b", "token: ${env:A}***"),
        ("token: ${a b}", "token: ***"),
    ]);
}

#[test]
fn places_of_secrets_and_everything_else_stay() {
    stays(&[
        "",
        "\n\n",
        "token_file: /run/token\npassword-file: /x\nTokenFile: y\nkey_path: z\ncredentials_path = 'x'",
        "receivers:\n  otlp:\n    protocols:\n      grpc: {endpoint: 0.0.0.0:4317}\n",
        "processors: [batch, memory_limiter]\nservice:\n  pipelines: {}\n",
        "# a comment: https://host/x\r\n\tkey: value\u{a0}\u{feff}\n",
        "statements:\n  - set(attributes[\"a\"], \"b\") where attributes[\"token\"] == \"c\"\n",
        "image: org/token-service:1.2\narn: a:secret:b\nx: std::token::Y",
        "auth:\n  authenticator: bearertokenauth\n",
        "max: 5 # tokens\n",
        "regex: '^(?P<time>\\d{4}) (?P<token>[^ ]*) (?P<msg>.*)$'\n",
    ]);
    shows(&[("token_profile: abc", "token_profile: ***")]);
}

#[test]
fn only_bodies_of_a_document_are_masked() {
    let mut document = json!({
        "": { "body": "token: abc\nx: y", "content_type": "text/yaml" },
        "token": { "body_base64": "aHVudGVyMg==", "content_type": "" },
        "odd": 5,
    });
    mask_value(&mut document);
    let shown = json!({
        "": { "body": "token: ***\nx: y", "content_type": "text/yaml" },
        "token": { "body_base64": "***", "content_type": "" },
        "odd": 5,
    });
    assert_eq!(document, shown);
    let mut other = json!(["token: abc"]);
    mask_value(&mut other);
    assert_eq!(other, json!(["token: abc"]));
}

#[test]
fn a_large_text_takes_linear_time() {
    for part in [
        "[",
        "{",
        "token: \"\n",
        "token: '\n",
        "token: [\n",
        "x://a:b/",
        ":\\/\\/a:b",
        "${",
        "${a",
        "a:",
        "a=",
        "\"",
        "'",
        "'''",
        "\"\"\" ",
        "- ",
        "token:\n ",
        "<token>",
        "\\\"",
        "value: {",
        "- value: a\n",
        "{value:[",
        "token=\\\n",
        "-----BEGIN PRIVATE KEY-----",
        "PRIVATE KEY-----",
        "#",
        "token: '''\n",
        "[token: '",
        "a.\"",
        "{'",
        "token \t\"",
    ] {
        let text = part.repeat(300_000 / part.len());
        assert!(mask(&text).len() <= 2 * text.len() + 9);
        assert!(mask(&format!("{{{text}")).len() <= 2 * text.len() + 9);
    }
}

const SECRET: &str = "hunter2Zq";

fn word() -> impl Strategy<Value = String> {
    "[a-z][a-z_]{0,6}".prop_filter("no secret's name", |word| {
        !is_secret_name(word)
            && !["name", "key", "header", "value", "true", "null", "y", "n"].contains(&word.as_str())
    })
}

fn secret_key() -> impl Strategy<Value = String> {
    let name = prop::sample::select(vec![
        "password",
        "db_passwd",
        "passPhrase",
        "TOKEN",
        "client-secret",
        "x-api-key",
        "Authorization",
        "credentials",
        "private_key",
        "accessKey",
        "Set-Cookie",
        "client_key",
        "key_pem",
    ]);
    name.prop_map(str::to_owned)
}

fn leaf() -> BoxedStrategy<Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i32>().prop_map(Value::from),
        "[ -~äß\n\t]{0,12}".prop_map(Value::from),
    ]
    .boxed()
}

fn tree(leaf: impl Strategy<Value = Value> + Clone + 'static) -> impl Strategy<Value = Value> {
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(word(), inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

/// A document with something secret under a secret key somewhere.
fn document(tail: &'static str) -> impl Strategy<Value = Value> {
    let secret = prop_oneof![
        tail.prop_map(|tail| Value::from(format!("{SECRET}{tail}"))),
        tree(tail.prop_map(|tail| Value::from(format!("{SECRET}{tail}")))),
    ];
    let holder = (tree(leaf()), secret_key(), secret, tree(leaf()))
        .prop_map(|(before, key, secret, after)| json!({ "before": before, key: secret, "zz": after }));
    let path = prop::collection::vec((word(), tree(leaf()), any::<bool>()), 0..4);
    (path, holder).prop_map(|(path, holder)| {
        path.into_iter().fold(holder, |inner, (key, beside, list)| {
            if list { json!([beside, inner]) } else { json!({ key: inner, "zzz": beside }) }
        })
    })
}

/// Writes YAML; `style` decides between the ways to write the same.
fn yaml(value: &Value, indent: usize, style: &mut impl FnMut() -> usize) -> String {
    let pad = " ".repeat(indent);
    match value {
        Value::Object(map) if !map.is_empty() => {
            let entry = |(key, value): (&String, &Value)| {
                let key = if style().is_multiple_of(4) { format!("\"{key}\"") } else { key.clone() };
                let flush = value.is_array() && style().is_multiple_of(2);
                let value = yaml(value, if flush { indent } else { indent + 2 }, style);
                format!("\n{pad}{key}:{value}")
            };
            map.iter().map(entry).collect()
        }
        Value::Array(list) if !list.is_empty() => {
            let item = |value: &Value| match yaml(value, indent + 2, style) {
                block if block.starts_with('\n') => format!("\n{pad}- {}", block.trim_start()),
                scalar => format!("\n{pad}-{scalar}"),
            };
            list.iter().map(item).collect()
        }
        Value::String(text) => {
            let plain = text.bytes().all(|byte| byte.is_ascii_alphanumeric()) && !text.is_empty();
            match style() % 4 {
                0 if plain => format!(" {text}"),
                1 if !text.contains('\n') => format!(" '{}'", text.replace('\'', "''")),
                2 if !text.starts_with([' ', '\n', '\t']) && !text.is_empty() => {
                    format!(" |-\n{pad}{}", text.replace('\n', &format!("\n{pad}")))
                }
                _ => format!(" {value}"),
            }
        }
        Value::Object(_) | Value::Array(_) | Value::Null | Value::Bool(_) | Value::Number(_) => {
            format!(" {value}")
        }
    }
}

proptest! {
    #[test]
    fn any_text_is_taken(text in any::<String>()) {
        let shown = mask(&text);
        prop_assert!(!shown.is_empty() || text.is_empty());
    }

    #[test]
    fn any_odd_text_is_taken(text in "([\\[\\]{}:=,#|>\"'\\\\\n -]|token|value|name|://|@|\\$\\{env:|}|ä|\r|\t){0,60}") {
        mask(&text);
        mask(&format!("{{{text}}}"));
    }

    #[test]
    fn what_has_no_secret_stays(value in tree("[A-Za-z0-9 .,/_-]{0,12}".prop_filter("no secret's name", |text| !is_secret_name(text)).prop_map(Value::from)), styles in prop::collection::vec(any::<u8>(), 1..20)) {
        let mut styles = styles.into_iter().cycle();
        let text = yaml(&value, 0, &mut || styles.next().map_or(0, usize::from));
        prop_assert_eq!(mask(&text), text);
        let text = format!("{value:#}");
        prop_assert_eq!(mask(&text), text);
    }

    #[test]
    fn no_secret_survives_in_json(document in document("[ -~ä\n\t]{0,8}")) {
        for text in [document.to_string(), format!("{document:#}")] {
            let shown = mask(&text);
            prop_assert!(!shown.contains(SECRET), "{} shows {}", text, shown);
            let shown = mask(&text[..text.floor_char_boundary(text.len() - text.len() / 8)]);
            prop_assert!(!shown.contains(SECRET), "cut: {} shows {}", text, shown);
        }
    }

    #[test]
    fn no_secret_survives_in_yaml(document in document("[ -~\n]{0,8}"), styles in prop::collection::vec(any::<u8>(), 1..20)) {
        let mut styles = styles.into_iter().cycle();
        let text = yaml(&document, 0, &mut || styles.next().map_or(0, usize::from));
        let shown = mask(&text);
        prop_assert!(!shown.contains(SECRET), "{}\nshows {}", text, shown);
    }

    #[test]
    fn no_secret_survives_in_assignments(lines in prop::collection::vec((any::<bool>(), word(), secret_key(), "[!-~]{0,8}"), 1..6)) {
        let text: Vec<String> = lines.into_iter().map(|(secret, word, key, tail)| {
            if secret { format!("{key}={SECRET}{tail}\n") } else { format!("{word}={tail}\n") }
        }).collect();
        let shown = mask(&text.concat());
        prop_assert!(!shown.contains(SECRET), "{} shows {}", text.concat(), shown);
    }
}
