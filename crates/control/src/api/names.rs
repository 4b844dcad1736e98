//! What people call things: names, slugs and addresses in bodies.

use super::error::ApiError;

/// Longest name, in characters.
const NAME_MAX_CHARS: usize = 128;
/// Longest slug, in characters.
const SLUG_MAX_CHARS: usize = 64;

/// `text` without the space around it, as the name in `field`.
///
/// # Errors
/// 400 names the field when it is empty, too long or has characters that cannot be seen.
pub(crate) fn name(field: &str, text: &str) -> Result<String, ApiError> {
    let text = text.trim();
    let fits = (1..=NAME_MAX_CHARS).contains(&text.chars().count());
    if fits && !text.chars().any(char::is_control) {
        return Ok(text.to_owned());
    }
    Err(ApiError::bad_request(format!(
        "the field '{field}' must have 1 to {NAME_MAX_CHARS} characters, none of them a control \
         character"
    )))
}

/// `text` as a slug in `field`.
///
/// # Errors
/// 400 names the field.
pub(crate) fn slug(field: &str, text: &str) -> Result<String, ApiError> {
    let fits = (1..=SLUG_MAX_CHARS).contains(&text.len());
    let is_plain = text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    if fits && is_plain && !text.starts_with('-') && !text.ends_with('-') {
        return Ok(text.to_owned());
    }
    Err(ApiError::bad_request(format!(
        "the field '{field}' must have 1 to {SLUG_MAX_CHARS} lower-case letters, digits and '-', \
         and no '-' at its ends"
    )))
}

/// The slug a name suggests: what is no letter or digit becomes `-`.
///
/// # Errors
/// 400 asks for a slug when nothing of the name can be one.
pub(crate) fn slug_of(name: &str) -> Result<String, ApiError> {
    let plain = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { ' ' });
    let plain: String = plain.collect::<String>().to_ascii_lowercase();
    let mut made = plain.split_whitespace().collect::<Vec<_>>().join("-");
    made.truncate(SLUG_MAX_CHARS);
    slug("slug", made.trim_matches('-'))
        .map_err(|_| ApiError::bad_request("the field 'slug' is needed: the name suggests none"))
}

/// `text` as the address of a person in `field`: anything before and after an `@`.
///
/// # Errors
/// 400 names the field.
pub(crate) fn email(field: &str, text: &str) -> Result<String, ApiError> {
    let text = name(field, text)?;
    let whole = text.split_once('@').is_some_and(|(a, b)| !a.is_empty() && !b.is_empty());
    if whole && !text.contains(char::is_whitespace) {
        return Ok(text);
    }
    Err(ApiError::bad_request(format!("the field '{field}' must be an e-mail address")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_trimmed_and_bounded() {
        assert_eq!(name("name", "  Ünïcode lab "), Ok("Ünïcode lab".to_owned()));
        for text in ["", "  ", "a\nb", "a\u{1b}[31m", &"a".repeat(129)] {
            let error = format!("{:?}", name("name", text).expect_err(text));
            assert!(error.contains("'name'"), "{error}");
        }
    }

    #[test]
    fn slugs_are_plain_and_can_be_made_of_names() {
        assert_eq!(slug("slug", "lab-2"), Ok("lab-2".to_owned()));
        for text in ["", "-a", "a-", "A", "ü", "a b", "a/b", &"a".repeat(65)] {
            assert!(slug("slug", text).is_err(), "{text:?} was accepted");
        }
        assert_eq!(slug_of("The  Lab (2nd)!"), Ok("the-lab-2nd".to_owned()));
        // 63 characters, a space and more: the cut leaves a `-` at the end, which goes.
        assert_eq!(slug_of(&format!("{} more", "a".repeat(63))), Ok("a".repeat(63)));
        assert!(slug_of("日本").is_err());
    }

    #[test]
    fn addresses_have_two_sides() {
        assert_eq!(email("email", " ada@example.org"), Ok("ada@example.org".to_owned()));
        for text in ["ada", "@x", "ada@", "a da@x"] {
            assert!(email("email", text).is_err(), "{text:?} was accepted");
        }
    }
}
