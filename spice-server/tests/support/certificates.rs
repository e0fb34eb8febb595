//! Certificates, made by OpenSSL.

use std::{path::PathBuf, process::Command};

use spice_server::TlsConfig;

use super::have;

/// An authority and a server certificate signed by it, made by OpenSSL.
pub struct Certificates {
    folder: tempfile::TempDir,
}

pub const SUBJECT: &str = "O=drago test,CN=a guest";

impl Certificates {
    /// `None`, with a line that says so, where there is no OpenSSL. `key`: arguments for its kind.
    pub fn new(key: &[&str]) -> Option<Self> {
        if !have("openssl") {
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let openssl = |arguments: &[&str]| {
            let out = Command::new("openssl")
                .args(arguments)
                .current_dir(folder.path())
                .output()
                .expect("openssl runs");
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        };
        let request = ["req", "-nodes", "-newkey"];
        let days = ["-days", "2"];
        for authority in ["ca", "other"] {
            let (key_file, cert) = (format!("{authority}.key"), format!("{authority}.pem"));
            let files = ["-keyout", &key_file, "-out", &cert, "-subj", "/CN=drago test authority"];
            openssl(&[&request[..], key, &["-x509"], &days, &files].concat());
        }
        let files = ["-keyout", "server.key", "-out", "server.csr"];
        openssl(&[&request[..], key, &files, &["-subj", "/O=drago test/CN=a guest"]].concat());
        std::fs::write(folder.path().join("san"), "subjectAltName=DNS:localhost,IP:127.0.0.1\n")
            .unwrap();
        let sign = ["x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key"];
        let files = ["-CAcreateserial", "-extfile", "san", "-out", "server.pem"];
        openssl(&[&sign[..], &files, &days].concat());
        Some(Self { folder })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn config(&self) -> TlsConfig {
        TlsConfig::from_files(&self.path("server.pem"), &self.path("server.key")).unwrap()
    }

    /// The client's property for an authority's file.
    pub fn ca(&self, name: &str) -> String {
        format!("ca-file={}", self.path(name).display())
    }
}

pub const RSA: &[&str] = &["rsa:2048"];
pub const EC: &[&str] = &["ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"];
