//! `--warm TEMPLATE=N`.

use std::str::FromStr;

use belljar_sandbox::Warm;

/// How many sandboxes of which template stand ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct WarmOption {
    pub(crate) template: String,
    pub(crate) count: u16,
}

/// Why that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WarmError {
    /// No template, or no number.
    #[error("{text:?} is not TEMPLATE=N, such as base=2")]
    Form {
        /// What was given.
        text: String,
    },
    /// Not a number of sandboxes.
    #[error("{count:?} is not a number of sandboxes from 0 to 65535")]
    Count {
        /// What was given.
        count: String,
    },
    /// Named again.
    #[error("--warm names {template:?} twice: give one number")]
    Twice {
        /// The template.
        template: String,
    },
    /// More than there may be.
    #[error(
        "--warm keeps {wanted} sandboxes ready and --sandboxes-max allows {most}: lower one or raise the other"
    )]
    TooMany {
        /// All of them together.
        wanted: u64,
        /// The limit.
        most: u16,
    },
}

impl FromStr for WarmOption {
    type Err = WarmError;

    fn from_str(text: &str) -> Result<WarmOption, WarmError> {
        // An alias may have an equals sign in it; a number has none.
        let (template, count) = text
            .rsplit_once('=')
            .filter(|(template, _)| !template.is_empty())
            .ok_or_else(|| WarmError::Form { text: text.to_owned() })?;
        let count = count.parse().map_err(|_| WarmError::Count { count: count.to_owned() })?;
        Ok(WarmOption { template: template.to_owned(), count })
    }
}

/// What all of them mean on a host of at most `most` sandboxes.
///
/// # Errors
/// [`WarmError`].
pub(crate) fn plan(options: &[WarmOption], most: u16) -> Result<Vec<Warm>, WarmError> {
    let wanted: u64 = options.iter().map(|option| u64::from(option.count)).sum();
    if wanted > u64::from(most) {
        return Err(WarmError::TooMany { wanted, most });
    }
    for (place, option) in options.iter().enumerate() {
        if options[..place].iter().any(|earlier| earlier.template == option.template) {
            return Err(WarmError::Twice { template: option.template.clone() });
        }
    }
    let warm = options.iter();
    Ok(warm
        .map(|option| Warm { template: option.template.clone(), count: option.count.into() })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn option(template: &str, count: u16) -> WarmOption {
        WarmOption { template: template.to_owned(), count }
    }

    #[test]
    fn a_template_and_a_number_are_read_and_anything_else_is_named() {
        assert_eq!("base=2".parse(), Ok(option("base", 2)));
        assert_eq!("a=b=0".parse(), Ok(option("a=b", 0)));
        for bad in ["base", "=3", ""] {
            let error = bad.parse::<WarmOption>().expect_err("no form");
            assert_eq!(error, WarmError::Form { text: bad.to_owned() });
        }
        for bad in ["base=", "base=-1", "base=many", "base=65536"] {
            let error = bad.parse::<WarmOption>().expect_err("no number");
            assert!(matches!(error, WarmError::Count { .. }), "{error}");
        }
    }

    #[test]
    fn together_they_fit_the_host_and_each_is_named_once() {
        let options = [option("a", 2), option("b", 3)];
        assert_eq!(plan(&options, 5).map(|warm| warm.len()), Ok(2));
        assert_eq!(plan(&options, 4), Err(WarmError::TooMany { wanted: 5, most: 4 }));
        let twice = [option("a", 1), option("b", 1), option("a", 0)];
        assert_eq!(plan(&twice, 9), Err(WarmError::Twice { template: "a".to_owned() }));
    }
}
