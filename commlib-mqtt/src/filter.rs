//! The algebra of MQTT topic filters: what matches, what covers what.

/// Whether a filter holds a wildcard.
pub(crate) fn is_wild(filter: &str) -> bool {
    filter.split('/').any(|level| matches!(level, "+" | "#"))
}

/// Whether every topic that `narrow` matches is matched by `wide` too.
///
/// A topic is a filter without wildcards, so this also decides whether a filter matches a topic.
pub(crate) fn covers(wide: &str, narrow: &str) -> bool {
    // MQTT 3.1.1, 4.7.2: a wildcard in front does not match topics of the broker's own, such as `$SYS/…`.
    if narrow.starts_with('$') && wide.starts_with(['+', '#']) {
        return false;
    }
    let mut levels = narrow.split('/');
    for want in wide.split('/') {
        if want == "#" {
            return true;
        }
        match levels.next() {
            Some(have) if want == have || (want == "+" && have != "#") => {}
            _ => return false,
        }
    }
    levels.next().is_none()
}

/// Whether some topic is matched by both filters.
pub(crate) fn overlap(a: &str, b: &str) -> bool {
    if a.starts_with('$') != b.starts_with('$') {
        return false;
    }
    let (mut left, mut right) = (a.split('/'), b.split('/'));
    loop {
        match (left.next(), right.next()) {
            (Some("#"), _) | (_, Some("#")) | (None, None) => return true,
            (Some(x), Some(y)) if x == y || x == "+" || y == "+" => {}
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn topics() {
        for (filter, topic, expected) in [
            ("a/b", "a/b", true),
            ("a/b", "a", false),
            ("a/+", "a/b", true),
            ("a/+", "a/", true),
            ("a/+", "a/b/c", false),
            ("a/#", "a/b/c", true),
            ("a/#", "a", true),
            ("a/#", "ab", false),
            ("#", "a/b", true),
            ("#", "$SYS/x", false),
            ("+/x", "$SYS/x", false),
            ("$SYS/#", "$SYS/x", true),
            ("a/+/c", "a/b/c", true),
            ("é/+", "é/b", true),
        ] {
            assert_eq!(covers(filter, topic), expected, "{filter} on {topic}");
        }
    }

    #[test]
    fn filters() {
        for (wide, narrow, expected) in [
            ("a/#", "a/+", true),
            ("a/+", "a/#", false),
            ("a/#", "a/b/#", true),
            ("+/#", "#", false),
            ("#", "+/#", true),
            ("#", "$SYS/#", false),
            ("a/+/c", "a/b/c", true),
            ("a/b", "a/+", false),
        ] {
            assert_eq!(covers(wide, narrow), expected, "{wide} over {narrow}");
        }
        assert!(overlap("a/+", "+/b") && overlap("a/#", "a") && overlap("#", "x/+"));
        assert!(!overlap("a/+", "b/#") && !overlap("#", "$SYS/#") && !overlap("a/b", "a/+/c"));
    }

    proptest! {
        #[test]
        fn covering_is_transitive_and_implies_overlap(
            a in "([ab+]/){0,2}[ab+#]", b in "([ab+]/){0,2}[ab+#]", topic in "([ab]/){0,2}[ab]"
        ) {
            if covers(&a, &b) {
                prop_assert!(overlap(&a, &b));
                prop_assert!(!covers(&b, &topic) || covers(&a, &topic));
            }
            if covers(&a, &topic) && covers(&b, &topic) {
                prop_assert!(overlap(&a, &b) && overlap(&b, &a));
            }
        }
    }
}
