//! The password of the moment, and until when it is good.

use std::time::SystemTime;

use crate::{Expiry, Secret};

/// What a client that wants to begin a session has to know.
#[derive(Debug, Clone)]
pub(crate) enum Ticket {
    /// Nothing.
    None,
    Password(Secret),
    /// There is nothing it could know: the password has expired, or none has been set.
    Impossible,
}

/// The password of the moment.
#[derive(Debug)]
pub(crate) struct Password {
    secret: Option<Secret>,
    /// Without a password nobody comes in.
    required: bool,
    expires: Expiry,
}

impl Password {
    pub(crate) fn new(secret: Option<Secret>, required: bool) -> Self {
        Self { required: required || secret.is_some(), secret, expires: Expiry::Never }
    }

    /// Another one; from now on clients have to know one.
    pub(crate) fn set(&mut self, secret: Secret, expires: Expiry) {
        *self = Self { secret: Some(secret), required: true, expires };
    }

    pub(crate) fn expire(&mut self, expires: Expiry) {
        self.expires = expires;
    }

    pub(crate) fn is_required(&self) -> bool {
        self.required
    }

    pub(crate) fn ticket(&self, now: SystemTime) -> Ticket {
        match &self.secret {
            _ if self.expires.is_over(now) => Ticket::Impossible,
            Some(secret) => Ticket::Password(secret.clone()),
            None if self.required => Ticket::Impossible,
            None => Ticket::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn passwords_come_and_expire() {
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        let mut password = Password::new(None, false);
        assert!(matches!(password.ticket(start), Ticket::None));
        assert!(!password.is_required());
        let end = start + Duration::from_secs(60);
        password.set(Secret::new("x").unwrap(), Expiry::At(end));
        assert!(matches!(password.ticket(start), Ticket::Password(_)));
        assert!(matches!(password.ticket(end), Ticket::Impossible));
        password.expire(Expiry::Never);
        assert!(matches!(password.ticket(end), Ticket::Password(_)));
        password.expire(Expiry::Now);
        assert!(matches!(password.ticket(start), Ticket::Impossible));
        assert!(password.is_required());
    }

    #[test]
    fn without_one_nobody_comes_in_where_one_is_required() {
        let now = SystemTime::now();
        assert!(matches!(Password::new(None, true).ticket(now), Ticket::Impossible));
        let given = Password::new(Some(Secret::new("x").unwrap()), true);
        assert!(matches!(given.ticket(now), Ticket::Password(_)));
    }
}
