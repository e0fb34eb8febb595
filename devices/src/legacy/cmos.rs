//! The MC146818 real time clock and its CMOS memory (Motorola MC146818A data sheet), read-only:
//! the guest sees the host's UTC time, in 24-hour BCD form, and cannot set it. There is no alarm
//! and no periodic interrupt.

use std::{
    sync::{Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use crate::bus::BusDevice;

/// First port: index; the second one is data.
pub const PORT: u64 = 0x70;
/// Number of ports.
pub const PORTS: u64 = 2;
/// CMOS register of the century, named in the FADT.
pub const CENTURY_REGISTER: u8 = 0x32;

const INDEX_MASK: u8 = 0x7f;
const REGISTER_A: u8 = 0x0a;
const REGISTER_B: u8 = 0x0b;
const REGISTER_D: u8 = 0x0d;
/// Divider for a 32.768 kHz crystal, 1024 Hz periodic rate, no update in progress.
const REGISTER_A_VALUE: u8 = 0x26;
/// 24-hour mode, BCD numbers: Linux on x86 takes them for BCD whatever this register says.
const REGISTER_B_VALUE: u8 = 0x02;
/// Valid RAM and time: the battery is good.
const REGISTER_D_VALUE: u8 = 0x80;

/// Civil time in UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Civil {
    year: u64,
    month: u8,
    day: u8,
    weekday: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

impl Civil {
    /// Converts seconds since 1970 with the proleptic Gregorian calendar: days are counted from
    /// 1 March of year 0, so that the leap day is the last of a year, in eras of 400 years.
    fn from_unix(seconds: u64) -> Self {
        const DAYS_0000_03_01_TO_1970: u64 = 719_468;
        const DAYS_PER_ERA: u64 = 146_097;
        let days = seconds / 86_400;
        let rest = seconds % 86_400;
        let shifted = days + DAYS_0000_03_01_TO_1970;
        let era = shifted / DAYS_PER_ERA;
        let day_of_era = shifted % DAYS_PER_ERA;
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
        let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
        let year = year_of_era + era * 400 + u64::from(month <= 2);
        Self {
            year,
            month: month as u8,
            day: day as u8,
            // 1 January 1970 was a Thursday; the chip counts from Sunday = 1.
            weekday: ((days + 4) % 7) as u8 + 1,
            hour: (rest / 3_600) as u8,
            minute: (rest % 3_600 / 60) as u8,
            second: (rest % 60) as u8,
        }
    }
}

/// Two decimal digits.
fn bcd(value: u8) -> u8 {
    ((value / 10 % 10) << 4) | (value % 10)
}

/// The clock.
#[derive(Debug, Default)]
pub struct Cmos {
    index: Mutex<u8>,
}

impl Cmos {
    /// A clock that follows the host's.
    pub fn new() -> Self {
        Self::default()
    }

    fn register(index: u8, seconds: u64) -> u8 {
        let now = Civil::from_unix(seconds);
        match index {
            0x00 => bcd(now.second),
            0x02 => bcd(now.minute),
            0x04 => bcd(now.hour),
            0x06 => bcd(now.weekday),
            0x07 => bcd(now.day),
            0x08 => bcd(now.month),
            0x09 => bcd((now.year % 100) as u8),
            REGISTER_A => REGISTER_A_VALUE,
            REGISTER_B => REGISTER_B_VALUE,
            REGISTER_D => REGISTER_D_VALUE,
            CENTURY_REGISTER => bcd((now.year / 100) as u8),
            _ => 0,
        }
    }
}

impl BusDevice for Cmos {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let index = *self.index.lock().unwrap_or_else(PoisonError::into_inner);
        let value = if offset == 0 {
            index
        } else {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            Self::register(index, now.as_secs())
        };
        if let Some(first) = data.first_mut() {
            *first = value;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, Some(&value)) = (offset, data.first()) {
            *self.index.lock().unwrap_or_else(PoisonError::into_inner) = value & INDEX_MASK;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calendar() {
        let at = |seconds| {
            let c = Civil::from_unix(seconds);
            (c.year, c.month, c.day, c.weekday, c.hour, c.minute, c.second)
        };
        assert_eq!(at(0), (1970, 1, 1, 5, 0, 0, 0));
        assert_eq!(at(951_782_399), (2000, 2, 28, 2, 23, 59, 59));
        assert_eq!(at(951_782_400), (2000, 2, 29, 3, 0, 0, 0));
        assert_eq!(at(1_709_251_199), (2024, 2, 29, 5, 23, 59, 59));
        assert_eq!(at(4_102_444_800), (2100, 1, 1, 6, 0, 0, 0));
    }

    #[test]
    fn update_is_never_in_progress_and_the_index_is_kept() {
        let cmos = Cmos::new();
        cmos.write(0, &[0x80 | REGISTER_A]);
        let mut byte = [0xff];
        cmos.read(1, &mut byte);
        assert_eq!(byte[0] & 0x80, 0);
        cmos.read(0, &mut byte);
        assert_eq!(byte, [REGISTER_A]);
        assert_eq!(Cmos::register(CENTURY_REGISTER, 0), 0x19);
        assert_eq!(Cmos::register(9, 0), 0x70);
        assert_eq!(Cmos::register(4, 951_782_399), 0x23);
    }
}
