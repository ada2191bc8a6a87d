//! The list: every case with what it needs.

use super::{Case, Need};

/// Calls another macro of this crate with the list.
#[doc(hidden)]
#[macro_export]
macro_rules! __with_cases {
    ($callback:ident! $($arguments:tt)*) => {
        $crate::$callback! {
            [$($arguments)*]
            topics {
                order_from_one_publisher []
                two_subscribers_each_get_all []
                first_message_after_subscribing_arrives []
                a_dropped_subscriber_gets_nothing_more []
                resubscribing_at_once_loses_nothing []
                overlapping_subscriptions_get_each_message_once []
                a_dropped_subscription_leaves_overlapping_ones_alone []
                a_multi_publisher_names_each_topic []
                a_slow_subscriber_stalls_nobody_and_sees_a_gap []
                missed_messages_are_counted_once []
                a_sequence_jump_is_a_gap []
                repetitions_are_dropped_on_request []
                handlers_get_messages_in_order []
                a_blocked_handler_delays_nobody []
                bad_names_are_refused []
            }
            patterns {
                last_star_is_one_or_more_segments []
                inner_star_is_one_segment []
                star_alone_is_everything []
                arrival_names_are_reported []
            }
            delivery {
                confirmed_messages_arrive [Confirms]
                many_receipts_are_confirmed_in_order [Confirms]
                what_cannot_be_promised_is_refused []
                every_message_is_acknowledged_by_use [Acks, Confirms]
                unhandled_messages_come_again_in_a_new_session [Acks, Confirms]
                a_failed_handler_gets_the_message_again [Acks]
                a_panicked_handler_gets_the_message_again [Acks]
                a_dropped_ack_brings_the_message_again [Acks]
                a_rejected_message_comes_again_or_not [Acks]
                an_unreadable_message_is_acknowledged [Acks]
                a_durable_subscription_keeps_messages_while_away [Acks, Confirms]
                overlapping_at_least_once_subscriptions [AckPatterns]
                repetitions_after_failure_are_not_dropped [Acks]
            }
            queues {
                services_share_the_work [Competing]
                every_service_gets_each_request [FanOut]
                a_request_for_nobody []
                requests_wait_for_their_service [Kept]
                a_service_can_restart []
                services_do_not_mix []
                a_server_serves_its_methods []
            }
            rpc {
                call_and_answer []
                a_hundred_calls_answered_out_of_order []
                a_timeout_is_a_timeout []
                a_late_reply_is_harmless []
                a_cancelled_call_leaves_nothing []
                an_undecodable_reply_is_told []
                repeated_replies_are_ignored []
                replies_to_nobody_are_harmless []
            }
            services {
                a_handlers_error_is_remote []
                a_handlers_panic_is_remote []
                a_blocked_handler_delays_no_other []
                an_undecodable_request_is_answered []
                a_request_without_reply_address_is_harmless []
                expired_requests_are_answered []
                a_full_service_says_so []
                a_repeated_request_runs_once []
                clocks_ten_years_off []
                foreign_callers_are_answered []
                a_reply_too_large_is_an_error []
            }
            messages {
                empty_and_odd_values []
                unicode_names_and_data []
                the_longest_name []
                escaped_names []
                two_hundred_kilobytes []
                the_largest_payload []
                too_large_is_refused_before_sending []
                malformed_is_reported_and_skipped []
                a_malformed_request_is_harmless []
                header_fields_travel []
                a_message_has_its_own_header []
                bare_data_is_delivered []
                a_robots_own_header_and_data []
                json_text_is_untouched []
            }
            life {
                the_link_is_connected []
                close_is_idempotent []
                use_after_close_is_closed []
                closing_ends_endpoints []
                closing_fails_calls_in_flight []
                accepted_messages_leave_before_the_close [Confirms]
                clones_share_the_end []
            }
            nodes {
                a_namespace_prefixes_names []
                shutdown_waits_for_running_handlers []
                shutdown_keeps_its_limit []
                a_dropped_handle_stops []
                a_stopped_handle_waits []
                a_detached_service_lives_as_long_as_its_node []
            }
            outage {
                states_go_reconnecting_then_connected [Outage]
                subscribers_resume_and_see_a_gap [Outage]
                services_and_clients_resume [Outage]
                calls_in_flight_fail_at_once [Outage]
                best_effort_says_that_the_link_is_down [Outage]
                at_least_once_waits_for_the_link [Outage, Confirms]
                durable_subscriptions_miss_nothing [Outage, Acks, Confirms]
                closing_works_without_a_link [Outage]
            }
        }
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __case_table {
    ([$name:ident] $($group:ident { $($case:ident [$($need:ident),*])* })*) => {
        /// All cases.
        pub const $name: &[Case] = &[$($(
            Case {
                group: stringify!($group),
                name: stringify!($case),
                needs: &[$(Need::$need),*],
                run: |fixture| Box::pin(super::$group::$case(fixture)),
            },
        )*)*];
    };
}

crate::__with_cases!(__case_table! CASES);

/// Turns the list of cases into tests, one `#[test]` each, in a module per group.
///
/// The argument is an `async fn(&'static Case) -> Option<impl Fixture>`, by a name that is in scope; `None` skips the
/// case. See [`conformance`](mod@crate::conformance).
#[macro_export]
macro_rules! conformance {
    ($make:expr) => {
        $crate::__with_cases!(__case_tests! $make);
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __case_tests {
    ([$make:expr] $($group:ident { $($case:ident [$($need:ident),*])* })*) => {
        $(
            mod $group {
                use super::*;

                $(
                    #[test]
                    fn $case() {
                        $crate::conformance::run_case(
                            concat!(stringify!($group), "::", stringify!($case)),
                            $make,
                        );
                    }
                )*
            }
        )*
    };
}

#[cfg(test)]
mod tests {
    use super::CASES;

    #[test]
    fn names_are_unique() {
        let mut names: Vec<_> = CASES.iter().map(ToString::to_string).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), CASES.len());
    }
}
