-- Jobs that run again after a bad end. How often they may, their spec says.
ALTER TABLE jobs ADD COLUMN retried     INTEGER NOT NULL DEFAULT 0;  -- after a failure, by --retries
ALTER TABLE jobs ADD COLUMN requeued    INTEGER NOT NULL DEFAULT 0;  -- after a loss, by --requeue
ALTER TABLE jobs ADD COLUMN oom         INTEGER NOT NULL DEFAULT 0;  -- its last attempt ran out of GPU memory
ALTER TABLE jobs ADD COLUMN oom_retried INTEGER NOT NULL DEFAULT 0;  -- after that, by --retry-oom
ALTER TABLE jobs ADD COLUMN not_before  REAL;                        -- it waits until then (monotonic s of its boot)
-- Memory of the smallest GPU that an attempt had, where it is known: how much more a next one may ask.
ALTER TABLE attempts ADD COLUMN card_bytes INTEGER;
-- Sweeps and keys, as the spec has them: kept as columns to be found by. crc does not cover them.
ALTER TABLE jobs ADD COLUMN array_id    TEXT;  -- of the sweep that the job is a member of
ALTER TABLE jobs ADD COLUMN job_key     TEXT;  -- of --key; of a member of a sweep with its values
ALTER TABLE jobs ADD COLUMN hold_reason TEXT;  -- why the queue itself has held it
CREATE INDEX jobs_by_array ON jobs (array_id, id) WHERE array_id IS NOT NULL;
CREATE UNIQUE INDEX jobs_by_key ON jobs (job_key)
  WHERE job_key IS NOT NULL AND state IN ('pending','starting','running','completed');
-- The runs of a name, newest first: what a job is expected to take is learned from them.
CREATE INDEX jobs_past ON jobs (name, ended_at) WHERE run_s IS NOT NULL;
-- The boot in which the process of an attempt was started: in another one its pid is a stranger's.
ALTER TABLE attempts ADD COLUMN boot TEXT;
-- When a waiting job has last asked this member to give cached GPU memory back (monotonic s).
ALTER TABLE members ADD COLUMN asked REAL;
