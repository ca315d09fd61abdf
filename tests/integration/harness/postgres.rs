//! A fresh Postgres database on the server that `DATABASE_URL` names.
//!
//! Without `DATABASE_URL` a test says that it is skipped; where `CI` is set, it fails.

use sqlx::{AssertSqlSafe, Connection, PgConnection};
use uuid::Uuid;

/// A database that is dropped with this value.
#[derive(Debug)]
pub(crate) struct Temporary {
    name: String,
    url: String,
    server: String,
}

impl Temporary {
    /// Creates a database with a random name.
    pub(crate) async fn create() -> Option<Self> {
        let Some(server) = variable("DATABASE_URL") else {
            assert!(
                variable("CI").is_none(),
                "DATABASE_URL must be set where CI is: no test is skipped there"
            );
            eprintln!("skipped on Postgres: DATABASE_URL is not set");
            return None;
        };
        let name = format!("opamp_test_{}", Uuid::new_v4().simple());
        run(&server, format!("CREATE DATABASE {name} TEMPLATE template0")).await.expect("a new database");
        Some(Self { url: with_database(&server, &name), name, server })
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let (server, name) = (self.server.clone(), self.name.clone());
        // On a thread and a runtime of its own: a test's runtime cannot wait here, and may be gone.
        let dropping = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
            runtime.block_on(run(&server, format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)"))).ok()
        });
        if !matches!(dropping.join(), Ok(Some(()))) {
            eprintln!("the test database {} could not be dropped", self.name);
        }
    }
}

async fn run(url: &str, text: String) -> Result<(), sqlx::Error> {
    let mut connection = PgConnection::connect(url).await?;
    sqlx::raw_sql(AssertSqlSafe(text)).execute(&mut connection).await?;
    connection.close().await
}

/// `url` with another database.
pub(super) fn with_database(url: &str, name: &str) -> String {
    let (address, options) =
        url.split_once('?').map_or((url, None), |(address, options)| (address, Some(options)));
    let host = address.find("://").map_or(0, |scheme| scheme + 3);
    let end = address[host..].find('/').map_or(address.len(), |slash| host + slash);
    let options = options.map(|options| format!("?{options}")).unwrap_or_default();
    format!("{}/{name}{options}", &address[..end])
}

#[expect(clippy::disallowed_methods, reason = "the environment tells tests where Postgres is")]
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}
