//! The `--spice` option: where SPICE clients come in, who may, and how they are protected.

use std::{net::SocketAddr, path::PathBuf};

use devices::spec::{Spec, SpecError};
use spice_server::{
    AgentPolicy, Capture, ClientPolicy, Clipboard, Secret, SecureChannels, ServerBuilder,
    TlsConfig, VideoCodecs, WebPage,
};

use super::{DisplayError, options::resolve};

/// Permissions of the Unix socket unless told otherwise: its user's.
const UNIX_MODE: u32 = 0o600;

/// Where to listen, and who may come in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpiceConfig {
    /// `address:port`, for clients with and without TLS.
    pub listen: Option<String>,
    /// A Unix socket and its permissions.
    pub unix: Option<(PathBuf, u32)>,
    /// File whose first line is the password; without one anybody may connect.
    pub password_file: Option<PathBuf>,
    /// Without a password nobody may connect, until one is set at run time.
    pub password_required: bool,
    /// What happens when a second viewer comes.
    pub clients: ClientPolicy,
    /// Origins of web pages elsewhere that may connect.
    pub origins: Vec<String>,
    /// TLS, if it is offered.
    pub tls: Option<TlsFiles>,
    /// What viewers and the guest may exchange.
    pub agent: AgentPolicy,
    /// File that keeps what viewers send.
    pub capture: Option<PathBuf>,
    /// How films are sent.
    pub video: VideoCodecs,
}

/// What TLS needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate chain.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// A second port, for TLS only.
    pub port: Option<u16>,
    /// What must not be in the clear.
    pub channels: SecureChannels,
}

impl SpiceConfig {
    /// Parses the value of `--spice` (see `docs/cli.md`).
    pub fn parse(mut spec: Spec) -> Result<Self, SpecError> {
        let word = spec.take_word();
        let mut unix = spec.take_path("unix")?;
        let listen = match word {
            Some(word) => match word.strip_prefix("unix:") {
                Some(path) if path.is_empty() || unix.is_some() => {
                    return Err(spec.invalid("unix", path, "expected one path, unix:PATH"));
                }
                Some(path) => {
                    unix = Some(path.into());
                    None
                }
                None => Some(word),
            },
            None => None,
        };
        let missing = spec.missing_word("ADDRESS:PORT or unix:PATH");
        let unix_mode = take_mode(&mut spec, unix.is_some())?;
        let password_file = spec.take_path("password-file")?;
        let password_required = spec.take_switch("password-required")?.unwrap_or_default();
        let clients = match spec.take("clients")?.as_deref() {
            None | Some("exclusive") => ClientPolicy::Exclusive,
            Some("refuse") => ClientPolicy::Refuse,
            Some("shared") => ClientPolicy::Shared,
            Some("view-only") => ClientPolicy::ViewOnly,
            Some(other) => {
                let reason = "expected exclusive, refuse, shared or view-only";
                return Err(spec.invalid("clients", other, reason));
            }
        };
        let tls = TlsFiles::take(&mut spec, listen.is_some())?;
        let agent = take_agent(&mut spec)?;
        let video = match spec.take("video-codec")? {
            None => VideoCodecs::Auto,
            Some(text) => {
                let reason = "expected auto, mjpeg, vp8, h264 or off";
                text.parse().map_err(|_| spec.invalid("video-codec", &text, reason))?
            }
        };
        let origins = spec.take_all("web-origin")?;
        let capture = spec.take_path("capture")?;
        spec.finish()?;
        if listen.is_none() && unix.is_none() {
            return Err(missing);
        }
        let unix = unix.map(|path| (path, unix_mode));
        Ok(Self {
            listen,
            unix,
            password_file,
            password_required,
            clients,
            tls,
            agent,
            origins,
            capture,
            video,
        })
    }

    /// The address to listen on.
    fn address(&self) -> Result<Option<SocketAddr>, DisplayError> {
        self.listen.as_deref().map(|text| resolve("spice", text)).transpose()
    }

    /// The password, read now so that it is in no command line.
    fn password(&self) -> Result<Option<Secret>, DisplayError> {
        let Some(path) = &self.password_file else { return Ok(None) };
        let secret = Secret::from_file(path)
            .map_err(|source| DisplayError::Password { path: path.clone(), source })?;
        Ok(Some(secret))
    }

    /// Sets up a server accordingly.
    pub(super) fn apply(&self, mut builder: ServerBuilder) -> Result<ServerBuilder, DisplayError> {
        let address = self.address()?;
        for origin in &self.origins {
            builder = builder.web_origin(origin);
        }
        if let Some(address) = address {
            builder = builder.listen(address);
        }
        if let Some((path, mode)) = &self.unix {
            builder = builder.listen_unix(path, *mode);
        }
        if let Some(tls) = &self.tls {
            let config = TlsConfig::from_files(&tls.certificate, &tls.key)
                .map_err(|source| DisplayError::Certificate { source })?;
            builder = builder.tls(Some(config)).secure_channels(tls.channels);
            if let (Some(mut address), Some(port)) = (address, tls.port) {
                address.set_port(port);
                builder = builder.listen_tls(address);
            }
        }
        if let Some(path) = &self.capture {
            let capture = Capture::create(path)
                .map_err(|source| DisplayError::Capture { path: path.clone(), source })?;
            tracing::warn!(path = %path.display(), "everything SPICE viewers type is written down");
            builder = builder.capture(Some(capture));
        }
        let builder = builder.password_required(self.password_required).video_codecs(self.video);
        Ok(builder.password(self.password()?).client_policy(self.clients).agent_policy(self.agent))
    }
}

/// `copy-paste=`, `copy-paste-limit=` and `file-transfer=`.
fn take_agent(spec: &mut Spec) -> Result<AgentPolicy, SpecError> {
    const MIB: u32 = 1 << 20;
    let clipboard = take_copy_paste(spec)?;
    let file_transfer = spec.take_switch("file-transfer")?.unwrap_or(true);
    let mut policy = AgentPolicy { clipboard, file_transfer, ..AgentPolicy::default() };
    if let Some(mib) = spec.take_parsed::<u32>("copy-paste-limit")? {
        policy.max_clipboard =
            mib.checked_mul(MIB).filter(|bytes| *bytes > 0).ok_or_else(|| {
                spec.invalid("copy-paste-limit", &mib.to_string(), "expected 1 to 4095 MiB")
            })?;
    }
    Ok(policy)
}

/// `copy-paste=`.
pub(super) fn take_copy_paste(spec: &mut Spec) -> Result<Clipboard, SpecError> {
    match spec.take("copy-paste")?.as_deref() {
        None | Some("on") => Ok(Clipboard::Both),
        Some("off") => Ok(Clipboard::Off),
        Some("to-guest") => Ok(Clipboard::ToGuest),
        Some("to-client") => Ok(Clipboard::ToClient),
        Some(other) => {
            Err(spec.invalid("copy-paste", other, "expected on, off, to-guest or to-client"))
        }
    }
}

/// `unix-mode=`, in octal.
fn take_mode(spec: &mut Spec, has_socket: bool) -> Result<u32, SpecError> {
    let Some(text) = spec.take("unix-mode")? else { return Ok(UNIX_MODE) };
    if !has_socket {
        return Err(spec.invalid("unix-mode", &text, "there is no Unix socket: add unix=PATH"));
    }
    match u32::from_str_radix(&text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err(spec.invalid("unix-mode", &text, "expected octal digits such as 0660")),
    }
}

/// Where Debian's and other packages have the page.
const WEB_FOLDER: &str = "/usr/share/spice-html5";

/// The page for browsers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WebConfig {
    /// `address:port`, beside the SPICE server's, which shows the page too.
    pub listen: Option<String>,
    /// The page's folder.
    pub folder: PathBuf,
}

impl WebConfig {
    /// Parses `[ADDRESS:PORT][,dir=FOLDER]`.
    pub fn parse(mut spec: Spec) -> Result<Self, SpecError> {
        let listen = spec.take_word();
        let folder = spec.take_path("dir")?.unwrap_or_else(|| WEB_FOLDER.into());
        spec.finish()?;
        Ok(Self { listen, folder })
    }

    /// Sets up a server accordingly.
    pub(super) fn apply(&self, builder: ServerBuilder) -> Result<ServerBuilder, DisplayError> {
        let page = WebPage::from_folder(&self.folder)
            .map_err(|source| DisplayError::Web { folder: self.folder.clone(), source })?;
        let builder = builder.web(Some(page));
        Ok(match &self.listen {
            Some(text) => builder.listen(resolve("web", text)?),
            None => builder,
        })
    }
}

impl TlsFiles {
    fn take(spec: &mut Spec, has_address: bool) -> Result<Option<Self>, SpecError> {
        let certificate = spec.take_path("tls-cert-file")?;
        let key = spec.take_path("tls-key-file")?;
        let port = spec.take_parsed::<u16>("tls-port")?;
        let channels = spec.take("tls-channels")?;
        let missing = |key: &str| spec.missing(key);
        let (certificate, key) = match (certificate, key) {
            (Some(certificate), Some(key)) => (certificate, key),
            (Some(_), None) => return Err(missing("tls-key-file")),
            (None, Some(_)) => return Err(missing("tls-cert-file")),
            (None, None) if port.is_some() || channels.is_some() => {
                return Err(missing("tls-cert-file"));
            }
            (None, None) => return Ok(None),
        };
        if let Some(port) = port
            && !has_address
        {
            let reason = "there is no address: begin with ADDRESS:PORT";
            return Err(spec.invalid("tls-port", &port.to_string(), reason));
        }
        let channels = match channels.as_deref() {
            None | Some("all") => SecureChannels::ALL,
            Some("none") => SecureChannels::NONE,
            Some(text) => {
                let mut channels = SecureChannels::NONE;
                for name in text.split('+') {
                    if !channels.add(name) {
                        let names: Vec<_> = SecureChannels::names().collect();
                        let reason =
                            format!("expected all, none, or names with + ({})", names.join("+"));
                        return Err(spec.invalid("tls-channels", text, reason));
                    }
                }
                channels
            }
        };
        Ok(Some(Self { certificate, key, port, channels }))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use spice_server::SpiceServer;

    use super::*;

    fn parse(text: &str) -> Result<SpiceConfig, SpecError> {
        SpiceConfig::parse(Spec::parse("spice", text).unwrap())
    }

    #[test]
    fn addresses_and_policies() {
        let config = parse("[::1]:5901,clients=shared").unwrap();
        assert_eq!(config.address().unwrap(), Some("[::1]:5901".parse().unwrap()));
        assert_eq!(config.clients, ClientPolicy::Shared);
        let config = parse("[::1]:5901,clients=view-only,password-required").unwrap();
        assert_eq!((config.clients, config.password_required), (ClientPolicy::ViewOnly, true));
        assert!(parse("clients=shared").is_err(), "the address is missing");
        assert!(parse("127.0.0.1:1,clients=some").is_err());
        let error = parse("no-port").unwrap().address().unwrap_err();
        assert!(error.to_string().starts_with("--spice no-port:"), "{error}");
    }

    #[test]
    fn what_viewers_and_guest_may_exchange() {
        let agent = |text: &str| parse(&format!("127.0.0.1:1{text}")).map(|config| config.agent);
        assert_eq!(agent("").unwrap(), AgentPolicy::default());
        let policy = agent(",copy-paste=to-guest,copy-paste-limit=2,file-transfer=off").unwrap();
        let wanted = AgentPolicy {
            clipboard: Clipboard::ToGuest,
            max_clipboard: 2 << 20,
            file_transfer: false,
        };
        assert_eq!(policy, wanted);
        for wrong in ["copy-paste=some", "copy-paste-limit=0", "copy-paste-limit=4096"] {
            let error = agent(&format!(",{wrong}")).unwrap_err().to_string();
            assert!(error.starts_with(&format!("--spice: {wrong}")), "{error}");
        }
    }

    #[test]
    fn codecs_of_films() {
        let video = |text: &str| parse(&format!("127.0.0.1:1{text}")).map(|config| config.video);
        assert_eq!(video("").unwrap(), VideoCodecs::Auto);
        let vp8 = VideoCodecs::Prefer(spice_server::VideoCodec::Vp8);
        assert_eq!(video(",video-codec=vp8").unwrap(), vp8);
        let h264 = VideoCodecs::Prefer(spice_server::VideoCodec::H264);
        assert_eq!(video(",video-codec=h264").unwrap(), h264);
        assert_eq!(video(",video-codec=off").unwrap(), VideoCodecs::Off);
        let error = video(",video-codec=av1").unwrap_err().to_string();
        assert!(error.starts_with("--spice: video-codec=av1: expected auto, mjpeg"), "{error}");
    }

    #[test]
    fn unix_sockets() {
        let config = parse("unix:/run/spice,unix-mode=0660").unwrap();
        assert_eq!(config.unix, Some(("/run/spice".into(), 0o660)));
        assert_eq!(config.listen, None);
        let config = parse("127.0.0.1:5900,unix=/run/spice").unwrap();
        assert_eq!(config.unix, Some(("/run/spice".into(), UNIX_MODE)));
        assert!(config.listen.is_some());
        for wrong in ["unix:", "unix:/a,unix=/b", "unix:/a,unix-mode=rw", "unix:/a,unix-mode=1777"]
        {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        let error = parse("127.0.0.1:1,unix-mode=600").unwrap_err().to_string();
        assert!(error.starts_with("--spice: unix-mode=600: there is no Unix socket"), "{error}");
    }

    #[test]
    fn tls() {
        let files = "tls-cert-file=/c,tls-key-file=/k";
        let tls = |text: &str| parse(text).unwrap().tls.unwrap();
        assert_eq!(tls(&format!("0.0.0.0:1,{files}")).channels, SecureChannels::ALL);
        let config = tls(&format!("0.0.0.0:1,{files},tls-port=5901,tls-channels=main+inputs"));
        assert_eq!(config.port, Some(5901));
        let mut channels = SecureChannels::NONE;
        assert!(channels.add("main") && channels.add("inputs"));
        assert_eq!(config.channels, channels);
        let error = |text: &str| parse(text).unwrap_err().to_string();
        assert_eq!(error("0.0.0.0:1,tls-key-file=/k"), "--spice: 'tls-cert-file=' is missing");
        assert_eq!(error("0.0.0.0:1,tls-cert-file=/c"), "--spice: 'tls-key-file=' is missing");
        assert_eq!(error("0.0.0.0:1,tls-port=5901"), "--spice: 'tls-cert-file=' is missing");
        assert!(error(&format!("unix:/x,{files},tls-port=1")).contains("there is no address"));
        assert!(error(&format!("0.0.0.0:1,{files},tls-channels=mian")).contains("main+display"));
        assert!(error(&format!("0.0.0.0:1,{files},tls-port=70000")).contains("tls-port=70000"));
    }

    #[test]
    fn a_capture_that_cannot_be_is_named() {
        let config = parse("127.0.0.1:0,capture=/nonexistent/capture").unwrap();
        let error = config.apply(SpiceServer::builder()).err().unwrap().to_string();
        assert!(error.contains("capture=/nonexistent/capture"), "{error}");
    }

    #[test]
    fn pages_for_browsers() {
        let parse_web = |text: &str| WebConfig::parse(Spec::parse("web", text).unwrap());
        let config = parse_web("").unwrap();
        assert_eq!((config.listen, config.folder), (None, WEB_FOLDER.into()));
        let config = parse_web("127.0.0.1:8080,dir=/nonexistent").unwrap();
        assert_eq!(config.listen.as_deref(), Some("127.0.0.1:8080"));
        let error = config.apply(SpiceServer::builder()).err().unwrap().to_string();
        assert!(
            error.contains("--web dir=/nonexistent") && error.contains("spice-html5"),
            "{error}"
        );
        assert!(parse_web("port=1").is_err());
        let config = parse("127.0.0.1:1,web-origin=https://a,web-origin=null").unwrap();
        assert_eq!(config.origins, ["https://a", "null"]);
    }

    #[test]
    fn a_certificate_that_cannot_be_had_is_named() {
        let config = parse("127.0.0.1:0,tls-cert-file=/nonexistent/c,tls-key-file=/k").unwrap();
        let error = config.apply(SpiceServer::builder()).err().unwrap();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(error.to_string().contains("tls-cert-file"), "{error}");
        assert!(source.contains("/nonexistent/c"), "{source}");
    }

    #[test]
    fn passwords_come_from_a_file_and_are_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("password");
        fs::write(&path, "open sesame\n").unwrap();
        let config = parse(&format!("127.0.0.1:1,password-file={}", path.display())).unwrap();
        let secret = config.password().unwrap().unwrap();
        assert!(!format!("{secret:?}").contains("sesame"));
        fs::remove_file(&path).unwrap();
        let error = config.password().unwrap_err();
        assert!(error.to_string().contains("password-file="), "{error}");
        fs::write(&path, "\n").unwrap();
        assert!(config.password().is_err(), "an empty password is a mistake");
    }
}
