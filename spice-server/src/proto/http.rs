//! The little HTTP a browser needs before it speaks SPICE: one `GET` per connection (RFC 9112), for a
//! page or for a WebSocket (RFC 6455, 4.2).

use sha1::{Digest, Sha1};

/// Largest request head.
pub(crate) const MAX_HEAD: usize = 8 * 1024;
const MAX_HEADERS: usize = 64;
/// The subprotocol under which SPICE goes over a WebSocket.
const SUBPROTOCOL: &str = "binary";
/// What the handshake's key is hashed with (RFC 6455, 1.3).
const WEBSOCKET_GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// What a browser asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    /// Without the query.
    pub(crate) path: String,
    /// From `?` on, or empty.
    pub(crate) query: String,
    pub(crate) host: Option<String>,
    /// The page that asks, if it is a page.
    pub(crate) origin: Option<String>,
    /// The answer that makes it a WebSocket, if that is asked for.
    pub(crate) upgrade: Option<String>,
    /// Bytes of the request.
    pub(crate) length: usize,
}

/// Why there is nothing else to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    TemporaryRedirect,
    BadRequest,
    Forbidden,
    NotFound,
    UpgradeRequired,
    TooLarge,
}

impl Status {
    fn line(self) -> &'static str {
        match self {
            Self::TemporaryRedirect => "307 Temporary Redirect",
            Self::BadRequest => "400 Bad Request",
            Self::Forbidden => "403 Forbidden",
            Self::NotFound => "404 Not Found",
            Self::UpgradeRequired => "426 Upgrade Required",
            Self::TooLarge => "431 Request Header Fields Too Large",
        }
    }
}

/// Understands a request head; `None` until it is complete.
pub(crate) fn parse(bytes: &[u8]) -> Result<Option<Request>, Status> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut head = httparse::Request::new(&mut headers);
    let length = match head.parse(bytes.get(..MAX_HEAD).unwrap_or(bytes)) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) if bytes.len() < MAX_HEAD => return Ok(None),
        Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
            return Err(Status::TooLarge);
        }
        Err(_) => return Err(Status::BadRequest),
    };
    if head.method != Some("GET") {
        return Err(Status::BadRequest);
    }
    let target = head.path.unwrap_or_default();
    let (path, query) = target.split_at(target.find('?').unwrap_or(target.len()));
    let values = |name: &'static str| {
        let headers = head.headers.iter().filter(move |h| h.name.eq_ignore_ascii_case(name));
        headers.filter_map(|header| std::str::from_utf8(header.value).ok())
    };
    let has = |name, word: &str| {
        values(name).flat_map(|v| v.split(',')).any(|part| part.trim().eq_ignore_ascii_case(word))
    };
    let mut upgrade = None;
    if has("upgrade", "websocket") {
        if !has("sec-websocket-version", "13") {
            return Err(Status::UpgradeRequired);
        }
        let Some(key) = values("sec-websocket-key").next() else {
            return Err(Status::BadRequest);
        };
        let protocol = has("sec-websocket-protocol", SUBPROTOCOL).then_some(SUBPROTOCOL);
        upgrade = Some(switching(&accept_key(key.trim()), protocol));
    }
    Ok(Some(Request {
        path: path.to_owned(),
        query: query.to_owned(),
        host: values("host").next().map(str::to_owned),
        origin: values("origin").next().map(str::to_owned),
        upgrade,
        length,
    }))
}

impl Request {
    /// Whether it comes from a page this server has sent, from a page of one of these origins, or
    /// from no page: a page of another site must not use what its reader can reach.
    pub(crate) fn is_welcome(&self, origins: &[String]) -> bool {
        let Some(origin) = &self.origin else { return true };
        let own = origin.split_once("://").map(|(_, host)| host);
        let same =
            matches!((own, &self.host), (Some(own), Some(host)) if own.eq_ignore_ascii_case(host));
        same || origins.iter().any(|known| known.eq_ignore_ascii_case(origin))
    }
}

fn switching(accept: &str, protocol: Option<&str>) -> String {
    let mut text = format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Accept: {accept}\r\n"
    );
    if let Some(protocol) = protocol {
        text.push_str("Sec-WebSocket-Protocol: ");
        text.push_str(protocol);
        text.push_str("\r\n");
    }
    text.push_str("\r\n");
    text
}

fn accept_key(key: &str) -> String {
    let mut hash = Sha1::new();
    hash.update(key.as_bytes());
    hash.update(WEBSOCKET_GUID);
    base64(&hash.finalize())
}

/// RFC 4648, 4.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for group in bytes.chunks(3) {
        let mut word = 0u32;
        for i in 0..3 {
            word = word << 8 | u32::from(group.get(i).copied().unwrap_or(0));
        }
        for i in 0..4 {
            let digit = DIGITS.get((word >> (18 - 6 * i)) as usize & 63).copied();
            let digit = digit.filter(|_| i <= group.len()).unwrap_or(b'=');
            text.push(char::from(digit));
        }
    }
    text
}

/// The head of an answer with a page.
pub(crate) fn page(kind: &str, length: usize) -> String {
    format!(
        "HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\
         Cache-Control: no-cache\r\nX-Content-Type-Options: nosniff\r\n\
         Content-Security-Policy: frame-ancestors 'none'\r\nConnection: close\r\n\r\n"
    )
}

/// Another address to go to.
pub(crate) fn redirect(location: &str) -> String {
    let line = Status::TemporaryRedirect.line();
    // What a client sent must not become lines of ours.
    let location: String = location.chars().filter(|c| c.is_ascii_graphic()).collect();
    format!(
        "HTTP/1.1 {line}\r\nLocation: {location}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    )
}

/// An answer without a page.
pub(crate) fn failure(status: Status, text: &str) -> String {
    let line = status.line();
    let length = text.len() + 1;
    let version = match status {
        Status::UpgradeRequired => "Sec-WebSocket-Version: 13\r\n",
        _ => "",
    };
    format!(
        "HTTP/1.1 {line}\r\nContent-Type: text/plain\r\nContent-Length: {length}\r\n{version}\
         Connection: close\r\n\r\n{text}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const UPGRADE: &str = "GET /websockify HTTP/1.1\r\nHost: vm:5900\r\nUpgrade: WebSocket\r\n\
        Connection: keep-alive, Upgrade\r\nOrigin: http://vm:5900\r\nSec-WebSocket-Version: 13\r\n\
        Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: base64, binary\r\n\r\n";

    #[test]
    fn a_websocket_is_asked_for() {
        let request = parse(UPGRADE.as_bytes()).unwrap().unwrap();
        let answer = request.upgrade.as_deref().unwrap();
        // The example of RFC 6455, 1.3.
        assert!(answer.contains("Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"));
        assert!(
            answer.contains("Sec-WebSocket-Protocol: binary\r\n") && answer.ends_with("\r\n\r\n")
        );
        assert_eq!(request.length, UPGRADE.len());
        for end in 0..UPGRADE.len() {
            assert_eq!(parse(&UPGRADE.as_bytes()[..end]), Ok(None), "cut at {end}");
        }
        let old = UPGRADE.replace("Version: 13", "Version: 8");
        assert_eq!(parse(old.as_bytes()), Err(Status::UpgradeRequired));
        let none = UPGRADE.replace("Sec-WebSocket-Protocol: base64, binary\r\n", "");
        let request = parse(none.as_bytes()).unwrap().unwrap();
        assert!(!request.upgrade.unwrap().contains("Sec-WebSocket-Protocol"));
    }

    #[test]
    fn pages_of_other_sites_are_not_welcome() {
        let welcome = |origin: &str, known: &[&str]| {
            let text = UPGRADE.replace("Origin: http://vm:5900\r\n", origin);
            let known: Vec<String> = known.iter().map(|o| (*o).to_owned()).collect();
            parse(text.as_bytes()).unwrap().unwrap().is_welcome(&known)
        };
        assert!(welcome("Origin: http://vm:5900\r\n", &[]));
        assert!(welcome("Origin: https://VM:5900\r\n", &[]));
        assert!(welcome("", &[]), "not a page");
        assert!(!welcome("Origin: http://vm\r\n", &[]), "another port");
        assert!(!welcome("Origin: http://evil.example\r\n", &[]));
        assert!(!welcome("Origin: null\r\n", &[]));
        assert!(welcome("Origin: https://desk.example\r\n", &["https://desk.example"]));
    }

    #[test]
    fn pages_are_asked_for() {
        let request = parse(b"GET /a/b.js?x=1 HTTP/1.1\r\nHost: h\r\n\r\nrest").unwrap().unwrap();
        assert_eq!((request.path.as_str(), request.query.as_str()), ("/a/b.js", "?x=1"));
        assert_eq!(request.upgrade, None);
        assert_eq!(parse(b"GET\0"), Err(Status::BadRequest));
        assert_eq!(parse(b"POST / HTTP/1.1\r\n\r\n"), Err(Status::BadRequest));
        let long = [b"GET / HTTP/1.1\r\n".as_slice(), &[b'x'; MAX_HEAD]].concat();
        assert_eq!(parse(&long), Err(Status::TooLarge));
        let many = ["GET / HTTP/1.1\r\n", &"a: b\r\n".repeat(MAX_HEADERS + 1), "\r\n"].concat();
        assert_eq!(parse(many.as_bytes()), Err(Status::TooLarge));
        assert!(!redirect("/x\r\nSet-Cookie: a").contains("\r\nSet"));
    }

    #[test]
    fn base64_of_every_length() {
        for (bytes, text) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v")] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }
}
