//! Dates for templates, without a clock.

use minijinja::{Error, ErrorKind};

use super::ChatError;

/// A date and a time of day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalTime {
    /// The year, such as 2026.
    pub year: i64,
    /// The month, 1 to 12.
    pub month: u32,
    /// The day of the month, from 1.
    pub day: u32,
    /// The hour, 0 to 23.
    pub hour: u32,
    /// The minute, 0 to 59.
    pub minute: u32,
    /// The second, 0 to 59.
    pub second: u32,
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = [
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
];

impl LocalTime {
    /// The time in UTC of a number of seconds since 1970.
    pub fn from_unix(seconds: i64) -> Self {
        let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
        // Years are counted from March 1 of the year 0, so that the day of a leap year comes last.
        let days = days + 719_468;
        let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
        let leaps = day_of_era / 1460 - day_of_era / 36_524 + day_of_era / 146_096;
        let year_of_era = (day_of_era - leaps) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * day_of_year + 2) / 153;
        let month = if march_month < 10 {
            march_month + 3
        } else {
            march_month - 9
        };
        LocalTime {
            year: year_of_era + era * 400 + i64::from(month <= 2),
            month: month as u32,
            day: (day_of_year - (153 * march_month + 2) / 5 + 1) as u32,
            hour: (second / 3600) as u32,
            minute: (second / 60 % 60) as u32,
            second: (second % 60) as u32,
        }
    }

    /// Days since 1970-01-01.
    fn days(&self) -> i64 {
        let year = self.year - i64::from(self.month <= 2);
        let month = (i64::from(self.month) + 9) % 12;
        let day_of_year = (153 * month + 2) / 5 + i64::from(self.day) - 1;
        365 * year + year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400) + day_of_year
            - 719_468
    }

    /// The day of the week, 0 for Monday.
    fn weekday(&self) -> usize {
        // 1970-01-01 was a Thursday.
        (self.days() + 3).rem_euclid(7) as usize
    }

    /// The day of the year, from 1.
    fn day_of_year(&self) -> i64 {
        let first = LocalTime {
            month: 1,
            day: 1,
            ..*self
        };
        self.days() - first.days() + 1
    }
}

/// Python's `datetime.now().strftime(format)`.
pub(super) fn strftime(now: Option<LocalTime>, format: &str) -> Result<String, Error> {
    let refuse = |what: String| Error::new(ErrorKind::InvalidOperation, what);
    let Some(now) = now else {
        let error = refuse("no time was given".into());
        return Err(error.with_source(ChatError::NoClock));
    };
    let month = MONTHS.get(now.month.wrapping_sub(1) as usize);
    let (Some(month), day) = (month, DAYS[now.weekday()]) else {
        return Err(refuse(format!("there is no month {}", now.month)));
    };
    let twelve = (now.hour + 11) % 12 + 1;
    let mut text = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            text.push(c);
            continue;
        }
        let mut code = rest.next();
        let bare = code == Some('-');
        if bare {
            code = rest.next();
        }
        let two = |value: u32| {
            if bare {
                value.to_string()
            } else {
                format!("{value:02}")
            }
        };
        text += &match code {
            Some('Y') => now.year.to_string(),
            Some('y') => two(now.year.rem_euclid(100) as u32),
            Some('m') => two(now.month),
            Some('d') => two(now.day),
            Some('e') => format!("{:2}", now.day),
            Some('H') => two(now.hour),
            Some('I') => two(twelve),
            Some('M') => two(now.minute),
            Some('S') => two(now.second),
            Some('p') => if now.hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('B') => (*month).to_owned(),
            Some('b' | 'h') => month[..3].to_owned(),
            Some('A') => day.to_owned(),
            Some('a') => day[..3].to_owned(),
            Some('j') if bare => now.day_of_year().to_string(),
            Some('j') => format!("{:03}", now.day_of_year()),
            Some('F') => format!("{}-{:02}-{:02}", now.year, now.month, now.day),
            Some('T') => format!("{:02}:{:02}:{:02}", now.hour, now.minute, now.second),
            Some('%') => "%".to_owned(),
            Some(other) => return Err(refuse(format!("strftime_now does not know %{other}"))),
            None => return Err(refuse("the format of strftime_now ends with %".into())),
        };
    }
    Ok(text)
}
