//! Ports of this machine that are to lead somewhere: looked at before anything takes minutes, and named in
//! words that help if somebody else has one.

use std::{
    fs,
    io::{self, ErrorKind},
    net::TcpListener,
    path::Path,
};

use anyhow::{Context, Error, Result, anyhow};

/// That a port of 127.0.0.1 is free. `option` makes the option that names a port, for the message.
pub(crate) fn ensure_free(port: u16, option: impl Fn(u16) -> String) -> Result<()> {
    match TcpListener::bind(("127.0.0.1", port)) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == ErrorKind::AddrInUse => Err(taken(port, option)),
        Err(error) => Err(error).with_context(|| {
            format!("{}: port {port} of 127.0.0.1 cannot be listened on", option(port))
        }),
    }
}

fn taken(port: u16, option: impl Fn(u16) -> String) -> Error {
    let by = listener(port).map_or_else(String::new, |who| format!(" by {who}"));
    let other = (port.max(1024)..u16::MAX)
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .map_or_else(String::new, |port| format!(", for example {}", option(port)));
    anyhow!(
        "{}: port {port} of 127.0.0.1 is taken{by}. Choose another one{other}, or end what has it",
        option(port)
    )
}

/// Who listens on a port, as far as this user may know (proc_net_tcp(5), proc_pid_fd(5)).
fn listener(port: u16) -> Option<String> {
    let socket = ["/proc/net/tcp", "/proc/net/tcp6"].into_iter().find_map(|table| {
        let table = fs::read_to_string(table).ok()?;
        table.lines().find_map(|line| listening_socket(line, port)).map(str::to_owned)
    })?;
    let link = format!("socket:[{socket}]");
    let has = |process: &Path| -> io::Result<bool> {
        Ok(fs::read_dir(process.join("fd"))?
            .flatten()
            .any(|fd| fs::read_link(fd.path()).is_ok_and(|to| to.as_os_str() == link.as_str())))
    };
    let process = fs::read_dir("/proc")
        .ok()?
        .flatten()
        .filter(|entry| entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit))
        .map(|entry| entry.path())
        // Where this user may look.
        .find(|process| has(process).unwrap_or(false))?;
    let name = fs::read_to_string(process.join("comm")).ok()?;
    Some(format!("{} (process {})", name.trim(), process.file_name()?.display()))
}

/// The socket's number, if this line of /proc/net/tcp is of one that listens on the port.
fn listening_socket(line: &str, port: u16) -> Option<&str> {
    const LISTENS: &str = "0A";
    let mut fields = line.split_whitespace();
    let (_, local) = fields.nth(1)?.rsplit_once(':')?;
    let state = fields.nth(1)?;
    let inode = fields.nth(5)?;
    (state == LISTENS && u16::from_str_radix(local, 16) == Ok(port)).then_some(inode)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_a_port_is_told_and_another_one_named() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let said = ensure_free(port, |port| format!("--x {port}")).unwrap_err().to_string();
        assert!(
            said.starts_with(&format!("--x {port}: port {port} of 127.0.0.1 is taken")),
            "{said}"
        );
        assert!(said.contains(&format!("(process {})", std::process::id())), "{said}");
        let other = said.split("for example --x ").nth(1).unwrap().split(',').next().unwrap();
        assert_ne!(other, port.to_string());
    }

    #[test]
    fn listening_sockets_are_told_from_connections() {
        let line = |state| {
            format!(
                "   0: 0100007F:170C 00000000:0000 {state} 00000000:00000000 00:00000000 00000000     0 \
                 0 12345 1 0000000000000000 100 0 0 10 0"
            )
        };
        assert_eq!(listening_socket(&line("0A"), 5900), Some("12345"));
        assert_eq!(listening_socket(&line("0A"), 5901), None);
        assert_eq!(listening_socket(&line("01"), 5900), None);
        assert_eq!(listening_socket("  sl  local_address rem_address   st", 5900), None);
    }
}
