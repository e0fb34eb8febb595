//! Hardware addresses.

use std::{fmt, str::FromStr};

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// A locally administered unicast address that depends on `seed` only, so that the same
    /// interface has the same address at each start.
    pub fn from_seed(seed: &str) -> Self {
        // FNV-1a: stable, and spreads well enough over the 24 bits behind QEMU's prefix.
        let hash = seed.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        let [a, b, c, d, e, ..] = (hash ^ (hash >> 32)).to_le_bytes();
        // 02 in the first byte: locally administered, unicast.
        Self([0x02, a, b, c, d, e])
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// A text is no hardware address.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("expected a unicast address such as 02:00:00:00:00:01")]
pub struct MacError;

impl FromStr for MacAddress {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let mut bytes = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or(MacError)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| MacError)?;
        }
        let unicast = bytes[0] & 1 == 0 && bytes != [0; 6];
        if parts.next().is_some() || !unicast {
            return Err(MacError);
        }
        Ok(Self(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_and_prints() {
        let mac: MacAddress = "02:00:5E:10:00:ff".parse().unwrap();
        assert_eq!(mac.to_string(), "02:00:5e:10:00:ff");
        for wrong in
            ["", "02:00:00:00:00", "02:00:00:00:00:00:00", "03:00:00:00:00:01", "+2:0:0:0:0:1"]
        {
            assert_eq!(wrong.parse::<MacAddress>(), Err(MacError), "{wrong}");
        }
    }

    #[test]
    fn defaults_are_stable_and_differ() {
        let (a, b) = (MacAddress::from_seed("tap0"), MacAddress::from_seed("tap1"));
        assert_eq!(a, MacAddress::from_seed("tap0"));
        assert_ne!(a, b);
        assert_eq!(a.0[0], 2);
    }
}
