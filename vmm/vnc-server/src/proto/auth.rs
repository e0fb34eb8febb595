//! "VNC authentication" (RFC 6143 §7.2.2): the challenge, encrypted with the password by DES.
//!
//! It is weak by construction: eight characters count, and the picture itself is not encrypted.

use des::{
    Des,
    cipher::{BlockCipherEncrypt, KeyInit},
};
use subtle::ConstantTimeEq;

/// Bytes of challenge and response.
pub const CHALLENGE: usize = 16;

/// Characters of a password that count.
pub const PASSWORD: usize = 8;

/// What a client that knows `password` answers to `challenge`.
pub fn response(password: &[u8], challenge: &[u8; CHALLENGE]) -> [u8; CHALLENGE] {
    let mut key = [0; PASSWORD];
    // The bits of each byte are used in reverse order: an accident that became the protocol.
    for (target, byte) in key.iter_mut().zip(password) {
        *target = byte.reverse_bits();
    }
    let cipher = Des::new(&key.into());
    let mut response = *challenge;
    let (blocks, _) = response.as_chunks_mut::<8>();
    for block in blocks {
        let mut cell = (*block).into();
        cipher.encrypt_block(&mut cell);
        *block = cell.into();
    }
    response
}

/// Whether the client knows the password; takes the same time whatever it answered.
pub fn is_right(password: &[u8], challenge: &[u8; CHALLENGE], answer: &[u8; CHALLENGE]) -> bool {
    response(password, challenge).ct_eq(answer).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_other_servers_compute_it() {
        // DES of zeroes under the key that 'secret' makes, from OpenSSL:
        // openssl enc -des-ecb -K cea6c64ea62e0000 -nopad
        let wanted = [0x96, 0x13, 0xa2, 0x3f, 0x1d, 0xca, 0xc5, 0x41];
        let seen = response(b"secret", &[0; CHALLENGE]);
        assert_eq!(seen[..8], seen[8..]);
        assert_eq!(seen[..8], wanted);
    }

    #[test]
    fn only_the_right_password() {
        let challenge = [7; CHALLENGE];
        assert!(is_right(b"secret", &challenge, &response(b"secret", &challenge)));
        assert!(!is_right(b"secret", &challenge, &response(b"Secret", &challenge)));
        assert!(is_right(b"12345678", &challenge, &response(b"12345678 and more", &challenge)));
    }
}
