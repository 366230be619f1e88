-- Where a job of an engine ran, as JSON: its engine, host, GPUs as the node calls them, how many.
ALTER TABLE jobs ADD COLUMN place TEXT;
-- The line in the policy's order: since when a job waits, which a requeue sets anew.
DROP INDEX jobs_line;
CREATE INDEX jobs_line ON jobs (state, held, priority, boot, queued_mono, submitted_at)
  WHERE state IN ('pending','starting','running');
