//! The algebra of MQTT topic filters: what matches, what covers what, and a map that is searched so.

use std::collections::{BTreeMap, HashMap};

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

/// Values by filter. Those without wildcards are found without looking at each.
#[derive(Debug)]
pub(crate) struct FilterMap<V> {
    exact: HashMap<String, V>,
    wild: BTreeMap<String, V>,
}

impl<V> Default for FilterMap<V> {
    fn default() -> Self {
        Self {
            exact: HashMap::new(),
            wild: BTreeMap::new(),
        }
    }
}

impl<V> FilterMap<V> {
    /// The value of this very filter.
    pub(crate) fn get(&self, filter: &str) -> Option<&V> {
        self.exact.get(filter).or_else(|| self.wild.get(filter))
    }

    /// As [`get`](Self::get), to change it.
    pub(crate) fn get_mut(&mut self, filter: &str) -> Option<&mut V> {
        let wild = &mut self.wild;
        self.exact.get_mut(filter).or_else(|| wild.get_mut(filter))
    }

    /// The value of a filter, a new one if there was none.
    pub(crate) fn get_or_default(&mut self, filter: &str) -> &mut V
    where
        V: Default,
    {
        let owned = filter.to_owned();
        if is_wild(filter) {
            self.wild.entry(owned).or_default()
        } else {
            self.exact.entry(owned).or_default()
        }
    }

    /// Sets the value of a filter.
    pub(crate) fn insert(&mut self, filter: &str, value: V) {
        let owned = filter.to_owned();
        if is_wild(filter) {
            self.wild.insert(owned, value);
        } else {
            self.exact.insert(owned, value);
        }
    }

    /// Forgets a filter.
    pub(crate) fn remove(&mut self, filter: &str) {
        if self.exact.remove(filter).is_none() {
            self.wild.remove(filter);
        }
    }

    /// All filters with their values.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &V)> {
        let exact = self.exact.iter().map(|(f, v)| (f.as_str(), v));
        exact.chain(self.wild.iter().map(|(f, v)| (f.as_str(), v)))
    }

    /// All values, to change them.
    pub(crate) fn values_mut(&mut self) -> impl Iterator<Item = &mut V> {
        self.exact.values_mut().chain(self.wild.values_mut())
    }

    /// The filters with a wildcard.
    pub(crate) fn wild(&self) -> impl Iterator<Item = &str> {
        self.wild.keys().map(String::as_str)
    }

    /// The values of all filters that cover a topic, or another filter.
    pub(crate) fn covering(&self, narrow: &str) -> impl Iterator<Item = &V> {
        let wild = self.wild.iter().filter(move |(f, _)| covers(f, narrow));
        let exact = self.exact.get(narrow);
        exact.into_iter().chain(wild.map(|(_, value)| value))
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

    #[test]
    fn a_map_finds_by_filter_and_by_topic() {
        let mut map = FilterMap::default();
        for (number, filter) in ["a/b", "a/#", "a/+", "c"].into_iter().enumerate() {
            map.insert(filter, number);
        }
        *map.get_or_default("a/#") += 10;
        map.remove("c");
        map.remove("a/+");
        map.insert("a/+", 2);
        assert_eq!((map.get("a/#"), map.get("c")), (Some(&11), None));
        assert_eq!(map.wild().collect::<Vec<_>>(), ["a/#", "a/+"]);
        assert_eq!(map.covering("a/b").collect::<Vec<_>>(), [&0, &11, &2]);
        assert_eq!(map.covering("a/+").collect::<Vec<_>>(), [&11, &2]);
        assert_eq!(map.covering("c").count(), 0);
        map.values_mut().for_each(|value| *value = 0);
        assert!(map.get_mut("a/b").is_some() && map.iter().all(|(_, value)| *value == 0));
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
