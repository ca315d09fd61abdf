//! [`Secret`]: a text that reaches logs, errors and `config check` only in masked form.

use std::fmt;

/// What is shown in place of a secret.
const MASK: &str = "***";

/// A token, or a URL that may hold a password. Printed as `***` by `Debug` and by `Display`.
///
/// It has no equality on purpose: tokens are compared in constant time by who admits a caller.
#[derive(Clone)]
pub struct Secret(String);

impl Secret {
    /// The text itself, for the one place that uses it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// The text as a URL for people: all but the password, and `***` where it is no URL.
    ///
    /// Passwords are often written without escapes, so the password is taken to reach up to the
    /// last `@`; rather too much is masked than too little.
    #[must_use]
    pub fn masked_url(&self) -> String {
        let Some((scheme, rest)) = self.0.split_once("://") else {
            return MASK.to_owned();
        };
        let rest = match rest.rsplit_once('@').map(|(info, host)| (info.split_once(':'), host)) {
            Some((Some((user, _)), host)) => format!("{user}:{MASK}@{host}"),
            Some((None, _)) | None => rest.to_owned(),
        };
        let Some((address, query)) = rest.split_once('?') else {
            return format!("{scheme}://{rest}");
        };
        let query: Vec<String> = query.split('&').map(masked_parameter).collect();
        format!("{scheme}://{address}?{}", query.join("&"))
    }
}

fn masked_parameter(parameter: &str) -> String {
    match parameter.split_once('=') {
        Some((name, _)) if name.to_lowercase().contains("password") => format!("{name}={MASK}"),
        Some(_) | None => parameter.to_owned(),
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(MASK)
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(MASK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_printed_nowhere() {
        let secret = Secret::from("hunter2");
        assert_eq!(format!("{secret} {secret:?} {:#?}", Some(&secret)), "*** *** Some(\n    ***,\n)");
        assert_eq!(secret.expose(), "hunter2");
    }

    #[test]
    fn a_url_loses_its_password_and_nothing_else() {
        let shown = |url: &str| Secret::from(url).masked_url();
        assert_eq!(shown("sqlite://opamp-server.db"), "sqlite://opamp-server.db");
        assert_eq!(shown("postgres://db:5432/fleet?a=b"), "postgres://db:5432/fleet?a=b");
        assert_eq!(shown("postgres://me@db/fleet"), "postgres://me@db/fleet");
        assert_eq!(shown("postgres://me:pw@db:5432/fleet"), "postgres://me:***@db:5432/fleet");
        assert_eq!(shown("postgres://me:p@w@db/fleet"), "postgres://me:***@db/fleet");
        assert_eq!(shown("postgres://me:p/w?x#y@[::1]/fleet"), "postgres://me:***@[::1]/fleet");
        assert_eq!(
            shown("postgres://db/fleet?user=me&Password=pw&x=1"),
            "postgres://db/fleet?user=me&Password=***&x=1"
        );
        assert_eq!(shown("pw"), "***");
    }
}
