//! The SPICE ticket: the password, RSA-OAEP(SHA-1) encrypted with a 1024-bit key of the server.
//!
//! 1024 bits and SHA-1 are the protocol's; they keep a password from being read off the wire by
//! accident, no more. Keys are replaced after a few links (see `io::keys`).

use rsa::{Oaep, RsaPrivateKey, pkcs8::EncodePublicKey, rand_core::OsRng};
use sha1::Sha1;
use subtle::ConstantTimeEq;

use super::link::{PUBLIC_KEY_SIZE, TICKET_SIZE};
use crate::{MAX_PASSWORD, Secret};

const KEY_BITS: usize = 1024;

/// A key pair for tickets.
pub(crate) struct TicketKey {
    private: RsaPrivateKey,
    public: [u8; PUBLIC_KEY_SIZE],
}

impl TicketKey {
    /// Makes a new key; takes tens of milliseconds. `None` if the system has no randomness.
    pub(crate) fn generate() -> Option<Self> {
        let private = RsaPrivateKey::new(&mut OsRng, KEY_BITS).ok()?;
        let der = private.to_public_key().to_public_key_der().ok()?;
        Some(Self { public: der.as_bytes().try_into().ok()?, private })
    }

    /// The DER form sent in the link reply.
    pub(crate) fn public(&self) -> &[u8; PUBLIC_KEY_SIZE] {
        &self.public
    }

    /// Whether `ticket` carries `password`. The comparison takes the same time for every content.
    pub(crate) fn verify(&self, ticket: &[u8; TICKET_SIZE], password: &Secret) -> bool {
        let plain = self.private.decrypt_blinded(&mut OsRng, Oaep::new::<Sha1>(), ticket);
        // Both sides are padded to one length so that not even the password's length shows.
        let mut given = [0u8; MAX_PASSWORD + 1];
        let mut fits = false;
        if let Ok(plain) = plain {
            let text = plain.split(|b| *b == 0).next().unwrap_or_default();
            if let Some(target) = given.get_mut(..text.len()) {
                target.copy_from_slice(text);
                fits = text.len() <= MAX_PASSWORD;
            }
        }
        let mut wanted = [0u8; MAX_PASSWORD + 1];
        if let Some(target) = wanted.get_mut(..password.as_bytes().len()) {
            target.copy_from_slice(password.as_bytes());
        }
        bool::from(given.ct_eq(&wanted)) && fits
    }
}

#[cfg(test)]
mod tests {
    use rsa::{RsaPublicKey, pkcs8::DecodePublicKey};

    use super::*;

    #[test]
    fn right_and_wrong_tickets() {
        let key = TicketKey::generate().unwrap();
        let public = RsaPublicKey::from_public_key_der(key.public()).unwrap();
        let seal = |text: &[u8]| -> [u8; TICKET_SIZE] {
            public.encrypt(&mut OsRng, Oaep::new::<Sha1>(), text).unwrap().try_into().unwrap()
        };
        let password = Secret::new("correct horse").unwrap();
        assert!(key.verify(&seal(b"correct horse\0"), &password));
        assert!(key.verify(&seal(b"correct horse"), &password));
        for wrong in
            [&b"\0"[..], b"correct hors\0", b"correct horse!\0", b"correct\0horse", &[1; 61]]
        {
            assert!(!key.verify(&seal(wrong), &password));
        }
        assert!(!key.verify(&[0x77; TICKET_SIZE], &password));
        assert!(!key.verify(&[0; TICKET_SIZE], &password));
    }
}
