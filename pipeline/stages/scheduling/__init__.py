"""Jobs submitted by cron expression, each fire once."""
