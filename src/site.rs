//! Which site a request comes from, as browsers tell: no page of another site reaches a listener through its visitors.
//!
//! A browser names the page behind a request in `Origin` and `Sec-Fetch-Site`. It does not tell that
//! a page's host name was pointed at this machine (DNS rebinding); where no token guards a listener,
//! only the names of this machine are answered. Agents and `curl` send none of this but `Host`.

/// Why a request is not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Foreign {
    /// `Origin` is not the host that is asked.
    #[error("the request comes from a page of another origin")]
    Origin,
    /// `Sec-Fetch-Site` says so.
    #[error("the request comes from a page of another site")]
    Site,
    /// Without token: `Host` is not this machine.
    #[error("without token this listener answers to localhost, 127.0.0.0/8 and [::1] only: set a token")]
    Host,
}

/// Looks at the headers of a request, by their names in lower case; `local` where only this machine is answered.
pub fn check<'a>(header: impl Fn(&str) -> Option<&'a [u8]>, local: bool) -> Result<(), Foreign> {
    if header("sec-fetch-site").is_some_and(|site| site.eq_ignore_ascii_case(b"cross-site")) {
        return Err(Foreign::Site);
    }
    let host = header("host");
    if let Some(origin) = header("origin")
        && !host.is_some_and(|host| is_same(origin, host))
    {
        return Err(Foreign::Origin);
    }
    // A browser always names the host.
    if local && host.is_some_and(|host| !is_loopback(host)) {
        return Err(Foreign::Host);
    }
    Ok(())
}

/// True where `origin` (`scheme://host[:port]`) names `host` (`host[:port]`).
fn is_same(origin: &[u8], host: &[u8]) -> bool {
    let (Ok(origin), Ok(host)) = (std::str::from_utf8(origin), std::str::from_utf8(host)) else {
        return false;
    };
    let Some((scheme, authority)) = origin.split_once("://") else { return false };
    let port = match scheme.to_ascii_lowercase().as_str() {
        "http" | "ws" => "80",
        "https" | "wss" => "443",
        _ => return false,
    };
    let (left, right) = (split(authority), split(host));
    left.0.eq_ignore_ascii_case(right.0) && left.1.unwrap_or(port) == right.1.unwrap_or(port)
}

fn is_loopback(host: &[u8]) -> bool {
    let Ok(host) = std::str::from_utf8(host) else { return false };
    let (name, _) = split(host);
    let bare = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    name.eq_ignore_ascii_case("localhost")
        || bare.parse::<std::net::IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
}

/// Name and port of an authority; the colons of an IPv6 address stand in brackets.
fn split(authority: &str) -> (&str, Option<&str>) {
    match authority.rsplit_once(':') {
        Some((name, port)) if !port.ends_with(']') => (name, Some(port)),
        _ => (authority, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(headers: &[(&str, &'static str)], local: bool) -> Result<(), Foreign> {
        let find =
            |name: &str| headers.iter().find(|(key, _)| *key == name).map(|(_, value)| value.as_bytes());
        check(find, local)
    }

    #[test]
    fn an_origin_is_the_host_or_foreign() {
        for (origin, host, same) in [
            ("http://fleet.example", "fleet.example", true),
            ("HTTP://Fleet.example", "fleet.EXAMPLE:80", true),
            ("https://fleet.example", "fleet.example", true),
            ("https://fleet.example:443", "fleet.example", true),
            ("https://fleet.example", "fleet.example:80", false),
            ("http://127.0.0.1:4321", "127.0.0.1:4321", true),
            ("http://127.0.0.1:4321", "127.0.0.1:4320", false),
            ("http://[::1]:4321", "[::1]:4321", true),
            ("http://[::1]", "[::1]", true),
            ("http://evil.example", "fleet.example", false),
            ("http://fleet.example.evil.example", "fleet.example", false),
            ("null", "fleet.example", false),
            ("", "fleet.example", false),
            ("file://", "", false),
        ] {
            let found = checked(&[("origin", origin), ("host", host)], false);
            assert_eq!(found, if same { Ok(()) } else { Err(Foreign::Origin) }, "{origin} at {host}");
        }
        assert_eq!(checked(&[("origin", "http://x")], false), Err(Foreign::Origin), "no host to compare");
    }

    #[test]
    fn without_token_only_this_machine_is_answered() {
        for (host, local) in [
            ("localhost", true),
            ("LOCALHOST:4321", true),
            ("127.0.0.1", true),
            ("127.1.2.3:4321", true),
            ("[::1]:4321", true),
            ("[::ffff:127.0.0.1]:4321", true),
            ("localhost.evil.example", false),
            ("127.0.0.1.evil.example", false),
            ("192.0.2.1:4321", false),
            ("0.0.0.0", false),
            ("", false),
        ] {
            assert_eq!(checked(&[("host", host)], true).is_ok(), local, "{host}");
            assert_eq!(checked(&[("host", host)], false), Ok(()), "{host}");
        }
        assert_eq!(checked(&[], true), Ok(()), "no browser asks without a host");
    }

    #[test]
    fn another_site_is_refused() {
        assert_eq!(checked(&[("sec-fetch-site", "cross-site")], false), Err(Foreign::Site));
        for site in ["same-origin", "same-site", "none"] {
            assert_eq!(checked(&[("sec-fetch-site", site)], false), Ok(()), "{site}");
        }
    }
}
