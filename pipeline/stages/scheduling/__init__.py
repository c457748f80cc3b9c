"""Jobs submitted by cron expression; each fire is submitted once."""
