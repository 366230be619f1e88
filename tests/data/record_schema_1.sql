BEGIN TRANSACTION;
CREATE TABLE attempts (
  attempt     TEXT PRIMARY KEY,
  job_id      INTEGER NOT NULL REFERENCES jobs (id),
  member      TEXT NOT NULL,
  gpus        TEXT NOT NULL,
  claimed_at  REAL NOT NULL,
  pid         INTEGER,
  start_ticks INTEGER,
  outcome     TEXT
) WITHOUT ROWID;
INSERT INTO "attempts" VALUES('2c0f757b20ec1c501f360edefaf59d4f',3,'m1','["GPU-0"]',1700000030.0,NULL,NULL,NULL);
INSERT INTO "attempts" VALUES('791b699f436cb0de927940681918a386',7,'m1','["GPU-0"]',1700000066.0,NULL,NULL,NULL);
INSERT INTO "attempts" VALUES('88dc93e997393e085f23ba886c67c5ad',1,'m1','["GPU-0"]',1700000005.0,4242,99,NULL);
INSERT INTO "attempts" VALUES('ba71ae8ca03146a30182cda34e1eafad',2,'m1','["GPU-0"]',1700000019.0,NULL,NULL,NULL);
INSERT INTO "attempts" VALUES('cd4af51a9dac9c06ae37f4fcfc414657',4,'m1','["GPU-0"]',1700000041.0,NULL,NULL,NULL);
INSERT INTO "attempts" VALUES('fba02ccc97e99ff936fc09a816cf671b',6,'m1','["GPU-0", "GPU-1"]',1700000058.0,NULL,NULL,NULL);
CREATE TABLE events (
  id      INTEGER PRIMARY KEY AUTOINCREMENT,
  at      REAL NOT NULL,
  job_id  INTEGER,
  attempt TEXT,
  what    TEXT NOT NULL,
  data    TEXT
);
INSERT INTO "events" VALUES(1,1700000003.0,1,NULL,'submitted','{"held": false, "priority": 0}');
INSERT INTO "events" VALUES(2,1700000004.0,1,'88dc93e997393e085f23ba886c67c5ad','claimed','{"gpus": ["GPU-0"], "state": "starting"}');
INSERT INTO "events" VALUES(3,1700000008.0,1,'88dc93e997393e085f23ba886c67c5ad','started','{"member": "shim1", "state": "running"}');
INSERT INTO "events" VALUES(4,1700000011.0,1,'88dc93e997393e085f23ba886c67c5ad','ended','{"exit_code": 0, "signal": null, "error": null, "state": "completed"}');
INSERT INTO "events" VALUES(5,1700000014.0,1,'88dc93e997393e085f23ba886c67c5ad','usage','{}');
INSERT INTO "events" VALUES(6,1700000017.0,2,NULL,'submitted','{"held": false, "priority": 0}');
INSERT INTO "events" VALUES(7,1700000018.0,2,'ba71ae8ca03146a30182cda34e1eafad','claimed','{"gpus": ["GPU-0"], "state": "starting"}');
INSERT INTO "events" VALUES(8,1700000022.0,2,'ba71ae8ca03146a30182cda34e1eafad','started','{"member": "shim1", "state": "running"}');
INSERT INTO "events" VALUES(9,1700000025.0,2,'ba71ae8ca03146a30182cda34e1eafad','ended','{"exit_code": 3, "signal": null, "error": "na\u00efve \u2603", "state": "failed"}');
INSERT INTO "events" VALUES(10,1700000028.0,3,NULL,'submitted','{"held": false, "priority": 0}');
INSERT INTO "events" VALUES(11,1700000029.0,3,'2c0f757b20ec1c501f360edefaf59d4f','claimed','{"gpus": ["GPU-0"], "state": "starting"}');
INSERT INTO "events" VALUES(12,1700000033.0,3,'2c0f757b20ec1c501f360edefaf59d4f','started','{"member": "shim1", "state": "running"}');
INSERT INTO "events" VALUES(13,1700000036.0,3,'2c0f757b20ec1c501f360edefaf59d4f','ended','{"exit_code": null, "signal": 9, "error": null, "state": "timeout"}');
INSERT INTO "events" VALUES(14,1700000039.0,4,NULL,'submitted','{"held": false, "priority": 0}');
INSERT INTO "events" VALUES(15,1700000040.0,4,'cd4af51a9dac9c06ae37f4fcfc414657','claimed','{"gpus": ["GPU-0"], "state": "starting"}');
INSERT INTO "events" VALUES(16,1700000044.0,4,'cd4af51a9dac9c06ae37f4fcfc414657','started','{"member": "shim1", "state": "running"}');
INSERT INTO "events" VALUES(17,1700000047.0,4,'cd4af51a9dac9c06ae37f4fcfc414657','ended','{"exit_code": null, "signal": null, "error": "kernel died", "state": "lost"}');
INSERT INTO "events" VALUES(18,1700000050.0,5,NULL,'submitted','{"held": false, "priority": 0}');
INSERT INTO "events" VALUES(19,1700000053.0,5,NULL,'ended','{"exit_code": null, "signal": null, "error": null, "state": "cancelled"}');
INSERT INTO "events" VALUES(20,1700000056.0,6,NULL,'submitted','{"held": false, "priority": 0}');
INSERT INTO "events" VALUES(21,1700000057.0,6,'fba02ccc97e99ff936fc09a816cf671b','claimed','{"gpus": ["GPU-0", "GPU-1"], "state": "starting"}');
INSERT INTO "events" VALUES(22,1700000061.0,6,'fba02ccc97e99ff936fc09a816cf671b','started','{"member": "shim1", "state": "running"}');
INSERT INTO "events" VALUES(23,1700000064.0,7,NULL,'submitted','{"held": false, "priority": 0}');
INSERT INTO "events" VALUES(24,1700000065.0,7,'791b699f436cb0de927940681918a386','claimed','{"gpus": ["GPU-0"], "state": "starting"}');
INSERT INTO "events" VALUES(25,1700000069.0,8,NULL,'submitted','{"held": false, "priority": 7}');
INSERT INTO "events" VALUES(26,1700000073.0,9,NULL,'submitted','{"held": true, "priority": 0}');
INSERT INTO "events" VALUES(27,1700000076.0,10,NULL,'submitted','{"held": false, "priority": 0}');
INSERT INTO "events" VALUES(28,1700000077.0,NULL,NULL,'drained','{"why": "drained by its user"}');
CREATE TABLE jobs (
  id               INTEGER PRIMARY KEY AUTOINCREMENT,
  uid              TEXT NOT NULL UNIQUE,  -- made by the submitter: a retried submit is no second job
  rev              INTEGER NOT NULL,      -- rises with every change of any job: what is new since?
  kind             TEXT NOT NULL,
  name             TEXT NOT NULL,
  spec             TEXT NOT NULL,         -- JSON, as submitted
  home             TEXT,
  state            TEXT NOT NULL CHECK (state IN
                     ('pending','starting','running','completed','failed','cancelled','timeout','lost')),
  priority         INTEGER NOT NULL,
  held             INTEGER NOT NULL,
  cancel_requested INTEGER NOT NULL,
  member           TEXT,
  epoch            INTEGER NOT NULL,
  attempt          TEXT,
  attempts         INTEGER NOT NULL,
  gpus             TEXT NOT NULL,         -- JSON list of UUIDs
  boot             TEXT NOT NULL,         -- the boot that the *_mono times belong to
  submitted_at     REAL NOT NULL,
  queued_mono      REAL NOT NULL,
  started_at       REAL,
  started_mono     REAL,
  ended_at         REAL,
  run_s            REAL,
  exit_code        INTEGER,
  signal           INTEGER,
  error            TEXT,
  peak_mem_bytes   INTEGER,
  mean_utilization REAL,
  energy_j         REAL,
  crc              INTEGER NOT NULL,      -- of all columns above but rev
  -- Why it waits: rewritten often and worked out anew at any time, so outside of crc and rev.
  reason_code      TEXT,
  reason           TEXT,
  reason_since     REAL
);
INSERT INTO "jobs" VALUES(1,'done',5,'command','done','{"uid":"done","kind":"command","name":"done","priority":0,"request":{"gpus":1,"mem_bytes":null,"on_gpu":null,"after":[],"after_any":[],"begin_at":null,"time_s":null,"retries":0,"requeue":false,"retry_oom":false,"max_running":null},"held":false,"argv":["/bin/true"],"shell":false,"code":null,"cwd":"/","env":{"PATH":"/bin"},"labels":{"a":"b"},"array":null,"sweep":{},"key":null,"engine":"local","owner":"terminal pts/1","home":null,"cell_id":null,"in_place":false}',NULL,'completed',0,0,0,'shim1',1,'88dc93e997393e085f23ba886c67c5ad',1,'["GPU-0"]','boot-of-schema-1',1700000001.0,1001.0,1700000007.0,1007.0,1700000010.0,3.0,0,NULL,NULL,1073741824,0.5,12.5,147774077,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(2,'failed',9,'command','failed','{"uid":"failed","kind":"command","name":"failed","priority":0,"request":{"gpus":1,"mem_bytes":null,"on_gpu":null,"after":[],"after_any":[],"begin_at":null,"time_s":null,"retries":0,"requeue":false,"retry_oom":false,"max_running":null},"held":false,"argv":["/bin/true"],"shell":false,"code":null,"cwd":"/","env":{},"labels":{},"array":null,"sweep":{},"key":null,"engine":"local","owner":"terminal pts/1","home":null,"cell_id":null,"in_place":false}',NULL,'failed',0,0,0,'shim1',1,'ba71ae8ca03146a30182cda34e1eafad',1,'["GPU-0"]','boot-of-schema-1',1700000015.0,1015.0,1700000021.0,1021.0,1700000024.0,3.0,3,NULL,'naïve ☃',NULL,NULL,NULL,35907518,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(3,'timeout',13,'command','timeout','{"uid":"timeout","kind":"command","name":"timeout","priority":0,"request":{"gpus":1,"mem_bytes":null,"on_gpu":null,"after":[],"after_any":[],"begin_at":null,"time_s":null,"retries":0,"requeue":false,"retry_oom":false,"max_running":null},"held":false,"argv":["/bin/true"],"shell":false,"code":null,"cwd":"/","env":{},"labels":{},"array":null,"sweep":{},"key":null,"engine":"local","owner":"terminal pts/1","home":null,"cell_id":null,"in_place":false}',NULL,'timeout',0,0,0,'shim1',1,'2c0f757b20ec1c501f360edefaf59d4f',1,'["GPU-0"]','boot-of-schema-1',1700000026.0,1026.0,1700000032.0,1032.0,1700000035.0,3.0,NULL,9,NULL,NULL,NULL,NULL,4075130271,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(4,'lost',17,'command','lost','{"uid":"lost","kind":"command","name":"lost","priority":0,"request":{"gpus":1,"mem_bytes":null,"on_gpu":null,"after":[],"after_any":[],"begin_at":null,"time_s":null,"retries":0,"requeue":false,"retry_oom":false,"max_running":null},"held":false,"argv":["/bin/true"],"shell":false,"code":null,"cwd":"/","env":{},"labels":{},"array":null,"sweep":{},"key":null,"engine":"local","owner":"terminal pts/1","home":null,"cell_id":null,"in_place":false}',NULL,'lost',0,0,0,'shim1',1,'cd4af51a9dac9c06ae37f4fcfc414657',1,'["GPU-0"]','boot-of-schema-1',1700000037.0,1037.0,1700000043.0,1043.0,1700000046.0,3.0,NULL,NULL,'kernel died',NULL,NULL,NULL,3347456871,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(5,'cancelled',19,'command','cancelled','{"uid":"cancelled","kind":"command","name":"cancelled","priority":0,"request":{"gpus":1,"mem_bytes":null,"on_gpu":null,"after":[],"after_any":[],"begin_at":null,"time_s":null,"retries":0,"requeue":false,"retry_oom":false,"max_running":null},"held":false,"argv":["/bin/true"],"shell":false,"code":null,"cwd":"/","env":{},"labels":{},"array":null,"sweep":{},"key":null,"engine":"local","owner":"terminal pts/1","home":null,"cell_id":null,"in_place":false}',NULL,'cancelled',0,0,1,NULL,0,NULL,0,'[]','boot-of-schema-1',1700000048.0,1048.0,NULL,NULL,1700000052.0,NULL,NULL,NULL,NULL,NULL,NULL,NULL,3022158108,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(6,'running',22,'command','running','{"uid":"running","kind":"command","name":"running","priority":0,"request":{"gpus":2,"mem_bytes":null,"on_gpu":null,"after":[],"after_any":[],"begin_at":null,"time_s":3600.0,"retries":0,"requeue":false,"retry_oom":false,"max_running":null},"held":false,"argv":["/bin/true"],"shell":false,"code":null,"cwd":"/","env":{},"labels":{},"array":null,"sweep":{},"key":null,"engine":"local","owner":"terminal pts/1","home":null,"cell_id":null,"in_place":false}',NULL,'running',0,0,0,'shim1',1,'fba02ccc97e99ff936fc09a816cf671b',1,'["GPU-0", "GPU-1"]','boot-of-schema-1',1700000054.0,1054.0,1700000060.0,1060.0,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,746529401,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(7,'starting',24,'command','starting','{"uid":"starting","kind":"command","name":"starting","priority":0,"request":{"gpus":1,"mem_bytes":8589934592,"on_gpu":null,"after":[],"after_any":[],"begin_at":null,"time_s":null,"retries":0,"requeue":false,"retry_oom":false,"max_running":null},"held":false,"argv":["/bin/true"],"shell":false,"code":null,"cwd":"/","env":{},"labels":{},"array":null,"sweep":{},"key":null,"engine":"local","owner":"terminal pts/1","home":null,"cell_id":null,"in_place":false}',NULL,'starting',0,0,0,'m1',1,'791b699f436cb0de927940681918a386',1,'["GPU-0"]','boot-of-schema-1',1700000062.0,1062.0,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,1038453414,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(8,'pending',25,'command','pending','{"uid":"pending","kind":"command","name":"pending","priority":7,"request":{"gpus":1,"mem_bytes":null,"on_gpu":null,"after":[1],"after_any":[2],"begin_at":2000000000.0,"time_s":null,"retries":0,"requeue":false,"retry_oom":false,"max_running":null},"held":false,"argv":["/bin/true"],"shell":false,"code":null,"cwd":"/","env":{},"labels":{},"array":null,"sweep":{},"key":null,"engine":"local","owner":"terminal pts/1","home":null,"cell_id":null,"in_place":false}',NULL,'pending',7,0,0,NULL,0,NULL,0,'[]','boot-of-schema-1',1700000067.0,1067.0,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,3261877900,'dependency','after #1',1700000070.0);
INSERT INTO "jobs" VALUES(9,'held',26,'command','held','{"uid":"held","kind":"command","name":"held","priority":0,"request":{"gpus":1,"mem_bytes":null,"on_gpu":null,"after":[],"after_any":[],"begin_at":null,"time_s":null,"retries":0,"requeue":false,"retry_oom":false,"max_running":null},"held":true,"argv":["/bin/true"],"shell":false,"code":null,"cwd":"/","env":{},"labels":{},"array":{"id":"sweep","index":0,"size":2},"sweep":{},"key":null,"engine":"local","owner":"terminal pts/1","home":null,"cell_id":null,"in_place":false}',NULL,'pending',0,1,0,NULL,0,NULL,0,'[]','boot-of-schema-1',1700000071.0,1071.0,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,2636322269,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(10,'cell',27,'cell','cell','{"uid":"cell","kind":"cell","name":"cell","priority":0,"request":{"gpus":1,"mem_bytes":null,"on_gpu":null,"after":[],"after_any":[],"begin_at":null,"time_s":null,"retries":0,"requeue":false,"retry_oom":false,"max_running":null},"held":false,"argv":null,"shell":false,"code":"print(1)","cwd":"/","env":{},"labels":{},"array":null,"sweep":{},"key":null,"engine":"local","owner":"terminal pts/1","home":"m2","cell_id":"c1","in_place":false}','m2','pending',0,0,0,NULL,0,NULL,0,'[]','boot-of-schema-1',1700000074.0,1074.0,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,1075227772,NULL,NULL,NULL);
CREATE TABLE leases (
  gpu       TEXT NOT NULL,
  job_id    INTEGER NOT NULL REFERENCES jobs (id),
  epoch     INTEGER NOT NULL,
  shared    INTEGER NOT NULL,
  mem_bytes INTEGER,
  PRIMARY KEY (gpu, job_id)
) WITHOUT ROWID;
INSERT INTO "leases" VALUES('GPU-0',6,1,0,NULL);
INSERT INTO "leases" VALUES('GPU-0',7,1,1,8589934592);
INSERT INTO "leases" VALUES('GPU-1',6,1,0,NULL);
CREATE TABLE members (
  key         TEXT PRIMARY KEY,
  kind        TEXT NOT NULL,           -- kernel, agent, shim, terminal, script
  pid         INTEGER NOT NULL,
  start_ticks INTEGER,
  boot        TEXT NOT NULL,
  label       TEXT NOT NULL,           -- "notebook train.ipynb", for people
  version     TEXT NOT NULL,
  joined_at   REAL NOT NULL,
  busy        INTEGER NOT NULL DEFAULT 0,
  idle_mono   REAL,                    -- since when it has run nothing (this boot's clock)
  pinned      TEXT                     -- JSON list of GPU UUIDs; NULL: not pinned
);
CREATE TABLE meta (
  key   TEXT PRIMARY KEY,
  value TEXT NOT NULL
) WITHOUT ROWID;
INSERT INTO "meta" VALUES('checked_boot','boot-of-schema-1');
INSERT INTO "meta" VALUES('drained','drained by its user');
CREATE INDEX jobs_by_rev ON jobs (rev);
CREATE INDEX jobs_open ON jobs (id) WHERE state IN ('pending','starting','running');
CREATE INDEX jobs_by_name ON jobs (name, id);
CREATE INDEX jobs_by_end ON jobs (ended_at);
CREATE INDEX attempts_by_job ON attempts (job_id);
CREATE INDEX events_by_job ON events (job_id, id);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('jobs',10);
INSERT INTO "sqlite_sequence" VALUES('events',28);
COMMIT;
PRAGMA user_version = 1;
