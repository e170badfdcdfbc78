------------------------------- MODULE Lease -------------------------------
(***************************************************************************)
(* The lease of botlease: lease, handover, probation and operator edits.    *)
(* docs/design.md says it in words; src/botlease/core.py and the statements *)
(* of the stores are what runs. One switch per rule R1 to R8 of the design: *)
(* with all of them TRUE no invariant is broken, with any one FALSE one is. *)
(*                                                                          *)
(* Time is discrete and kept as what is left of each timer, so that there is*)
(* no horizon: the states of all times are visited. Supervisor and work are *)
(* apart: a supervisor that is paused takes no step, and its work runs on   *)
(* until the kernel ends it. Requests and answers are lost, late and        *)
(* reordered without bound. Instance 1 has a clock that loses one tick in   *)
(* four: here rho is 25 %. What bounds the model: the terms that are handed *)
(* out, the number of faults, the requests under way.                       *)
(***************************************************************************)
EXTENDS Integers, FiniteSets

CONSTANTS
  N,         \* instances; a process that is started again is another one. Instance i is of the i-th deployment
  MaxTerm,   \* terms
  Budget,    \* faults
  MaxNet,    \* requests under way at once
  R1,        \* trust counts from before the renewal was sent; a late answer counts for nothing
  R2,        \* the stop does not depend on the supervisor
  R3,        \* a lease is taken only if released, watched for ttl*(1+rho), or by proof of death; then the lock-delay
  R4,        \* every write is a compare-and-set on exactly what was seen
  R5,        \* released only when the work is gone
  R6,        \* another timeline of the database: watched anew, and its terms begin above a gap
  R7,        \* a missing row is not free
  R8         \* after a stop signal nothing is acquired

TTL == 4
RHO == 1           \* ttl*rho, in ticks
KB == 1            \* kill budget
LD == 2            \* lock-delay; what a killed work had under way lands within a tick
TRIES == 1         \* two in the product, which the faults of the small sizes could not reach
Trust == TTL - RHO - KB
Patience == TTL + RHO
Inst == 1..N
Unknown == 99      \* the holder of a row that was put back
NoKey == [term |-> 0, who |-> -1, rtl |-> 0]

VARIABLES
  phase,           \* of the slow clock: it stands still in one tick of four
  left,            \* faults that are left
  row, prev, tl,   \* the lease row, the one before the last acquire, the timeline
  asg, fails,      \* the assignment; failed probations of each deployment
  net, ans,        \* requests and answers under way
  s, w,            \* supervisors and works
  last, flight,    \* the last term that worked; what a killed work may still have under way
  bad              \* what was broken in a step that leaves no trace in the state

vars == <<phase, left, row, prev, tl, asg, fails, net, ans, s, w, last, flight, bad>>

\* Beats only rise, so whether the row still shows the beat that somebody saw is kept with him ("cur"), and no number.
Key == [term |-> row.term, who |-> row.who, rtl |-> row.rtl]
Max(a, b) == IF a > b THEN a ELSE b
Min(a, b) == IF a < b THEN a ELSE b
NoAsk == [v |-> "none", age |-> 0, how |-> "none"]
NoFlight == [term |-> 0, ticks |-> 0]
Fresh == [ph |-> "standby", ask |-> NoAsk, term |-> 0, line |-> 0, until |-> 0, start |-> 0,
          key |-> NoKey, cur |-> TRUE, seen |-> 0, age |-> 0, doubt |-> FALSE, paused |-> FALSE, stop |-> FALSE]

Init ==
  /\ phase = 0 /\ left = Budget
  /\ row = [there |-> TRUE, term |-> 0, who |-> 0, was |-> 0, rtl |-> 0, exp |-> FALSE, prob |-> FALSE]
  /\ prev = row /\ tl = 0
  /\ asg = 0 /\ fails = [i \in Inst |-> 0]
  /\ net = {} /\ ans = {}
  /\ s = [i \in Inst |-> Fresh]
  /\ w = [i \in Inst |-> [run |-> FALSE, fence |-> 0]]
  /\ last = 0 /\ flight = NoFlight /\ bad = "no"

Alive(i) == s[i].ph # "dead"
Awake(i) == Alive(i) /\ ~s[i].paused
Idle(i) == s[i].ask.v = "none"
Set(i, r) == s' = [s EXCEPT ![i] = r]
\* In standby nothing of an old hold is kept, and nothing of what was seen before it.
Standby(r) == [Fresh EXCEPT !.paused = r.paused, !.stop = r.stop]

(* Looking -------------------------------------------------------------------- *)

Read(i) ==
  /\ Awake(i) /\ s[i].ph = "standby" /\ Idle(i) /\ row.there
  /\ Key # s[i].key \/ tl # s[i].seen \/ ~s[i].cur
  /\ Set(i, [s[i] EXCEPT !.key = Key, !.cur = TRUE, !.age = 0, !.seen = tl,
                         !.doubt = R6 /\ (row.rtl # tl \/ (s[i].key # NoKey /\ tl # s[i].seen))])
  /\ UNCHANGED <<phase, left, row, prev, tl, asg, fails, net, ans, w, last, flight, bad>>

\* The row is not there: what is put back belongs to nobody we know, and is not free.
PutBack(i) ==
  /\ Awake(i) /\ s[i].ph = "standby" /\ Idle(i) /\ ~row.there
  /\ row' = [row EXCEPT !.there = TRUE, !.who = IF R7 THEN Unknown ELSE 0, !.was = 0]
  /\ s' = [j \in Inst |-> [s[j] EXCEPT !.cur = @ /\ s[j].key.who # Unknown]]
  /\ net' = {[m EXCEPT !.cur = @ /\ m.key.who # Unknown] : m \in net}     \* its nonce is a new one
  /\ UNCHANGED <<phase, left, prev, tl, asg, fails, ans, w, last, flight, bad>>

(* Whose turn it is ------------------------------------------------------------ *)

\* Nobody has the assignment, or who has it is dead; or a strictly newer deployment, unless it is in quarantine.
Claim(i) ==
  /\ Awake(i) /\ s[i].ph = "standby" /\ Idle(i) /\ ~s[i].stop /\ asg # i
  /\ IF asg = 0 THEN TRUE ELSE ~Alive(asg) \/ (i > asg /\ fails[i] < TRIES)
  /\ asg' = i
  /\ UNCHANGED <<phase, left, row, prev, tl, fails, net, ans, s, w, last, flight, bad>>

Edit ==
  /\ left > 0 /\ left' = left - 1 /\ \E a \in 0..N : a # asg /\ asg' = a
  /\ UNCHANGED <<phase, row, prev, tl, fails, net, ans, s, w, last, flight, bad>>

(* Asking ------------------------------------------------------------------------ *)

How(i) ==
  LET k == s[i].key IN
  IF k.who = 0 /\ ~s[i].doubt THEN "released"
  ELSE IF k.who \in Inst /\ ~Alive(k.who) /\ ~w[k.who].run /\ ~s[i].doubt THEN "died"
  ELSE IF s[i].age >= Patience THEN "expired"
  ELSE IF ~R3 /\ k.who # i THEN "expired"     \* by the database's clock, which somebody has stepped
  ELSE "none"

\* An answer names its question: what was given up may still be carried out, but is answered to nobody.
Stale(i) == {IF m.i = i THEN [m EXCEPT !.live = FALSE] ELSE m : m \in net}

Ask(i, v, how) ==
  /\ Cardinality(net) < MaxNet
  /\ net' = Stale(i) \cup {[v |-> v, i |-> i, live |-> TRUE, key |-> s[i].key, cur |-> s[i].cur, term |-> s[i].term,
                            tl |-> s[i].seen, how |-> how]}
  /\ Set(i, [s[i] EXCEPT !.ask = [v |-> v, age |-> 0, how |-> how]])
  /\ UNCHANGED <<phase, left, row, prev, tl, asg, fails, ans, w, last, flight, bad>>

Acquire(i) ==
  /\ Awake(i) /\ s[i].ph = "standby" /\ Idle(i) /\ asg = i /\ s[i].key # NoKey /\ s[i].key.who # i
  /\ (R8 => ~s[i].stop) /\ row.term < MaxTerm
  /\ How(i) # "none" /\ Ask(i, "acquire", How(i))

\* The release of a hold that was seen, taken without another look: the acquire asks for it in the row itself.
Unread(i) ==
  /\ Awake(i) /\ s[i].ph = "standby" /\ Idle(i) /\ s[i].key.who \in Inst \ {i} /\ ~s[i].doubt
  /\ (R8 => ~s[i].stop) /\ row.term < MaxTerm
  /\ How(i) = "none" /\ Ask(i, "acquire", "unread")

Renew(i) == /\ Awake(i) /\ s[i].ph \in {"hold", "work", "drain"} /\ Idle(i)
            /\ s[i].until > 0 /\ s[i].until < Trust /\ Ask(i, "renew", "none")

Release(i) == /\ Awake(i) /\ Idle(i) /\ s[i].start <= 0
              /\ (s[i].ph = "reap" \/ (~R5 /\ s[i].ph = "drain")) /\ Ask(i, "release", "none")

\* An acquire with an unknown outcome: given back, never worked under.
GiveBack(i) ==
  /\ Awake(i) /\ s[i].ph = "standby" /\ Idle(i) /\ row.there /\ row.who = i /\ s[i].key = Key /\ s[i].cur
  /\ Set(i, [Standby(s[i]) EXCEPT !.ph = "reap", !.term = row.term, !.start = LD])
  /\ UNCHANGED <<phase, left, row, prev, tl, asg, fails, net, ans, w, last, flight, bad>>

(* The database ------------------------------------------------------------------- *)

Told(m, ok, term) ==
  ans' = IF m.live THEN ans \cup {[i |-> m.i, ok |-> ok, term |-> term, tl |-> tl]} ELSE ans
Served(m, ok, term) == net' = net \ {m} /\ Told(m, ok, term)

Mine(m) == row.there /\ row.who = m.i /\ row.term = m.term
Forget(ok, term) == flight' = IF ok /\ flight.term = term THEN NoFlight ELSE flight

\* What an acquire says it saw.
Fits(m) == /\ m.tl = tl
           /\ IF m.how = "unread" THEN Key = [m.key EXCEPT !.who = 0] ELSE Key = m.key /\ m.cur

Serve(m) ==
  \/ /\ m.v = "acquire"
     /\ IF row.there /\ asg = m.i /\ (R4 => Fits(m)) /\ row.term < MaxTerm
        THEN LET t == row.term + 1 + (IF R6 /\ row.rtl # tl THEN tl ELSE 0) IN
             /\ prev' = [row EXCEPT !.was = 0]
             /\ row' = [there |-> TRUE, term |-> t, who |-> m.i, was |-> 0, rtl |-> tl,
                        exp |-> m.how = "expired" \/ (m.how = "died" /\ row.exp),
                        prob |-> \E j \in Inst : j < m.i /\ Alive(j)]
             /\ Served(m, TRUE, t)
             /\ Forget(m.how = "died", row.term)    \* after a proof of death no lock-delay is promised
        ELSE Served(m, FALSE, 0) /\ UNCHANGED <<row, prev, flight>>
     /\ UNCHANGED <<phase, left, tl, asg, fails, s, w, last, bad>>
  \/ /\ m.v = "renew"
     /\ s' = [j \in Inst |-> [s[j] EXCEPT !.cur = @ /\ ~(Mine(m) /\ s[j].key = Key)]]
     /\ net' = {[o EXCEPT !.cur = @ /\ ~(Mine(m) /\ o.key = Key)] : o \in net \ {m}}
     /\ Told(m, Mine(m), m.term)
     /\ UNCHANGED <<phase, left, row, prev, tl, asg, fails, w, last, flight, bad>>
  \/ /\ m.v = "release"
     /\ row' = IF Mine(m) THEN [row EXCEPT !.who = 0, !.was = m.i] ELSE row
     \* who was stopped by a signal passes the assignment on
     /\ asg' = IF s[m.i].stop /\ asg = m.i /\ \E j \in Inst : j # m.i /\ s[j].ph = "standby" /\ ~s[j].stop
               THEN CHOOSE j \in Inst : j # m.i /\ s[j].ph = "standby" /\ ~s[j].stop ELSE asg
     /\ Served(m, Mine(m), m.term)
     /\ Forget(Mine(m), m.term)                     \* nor after a release, which says that the work was reaped
     /\ UNCHANGED <<phase, left, prev, tl, fails, s, w, last, bad>>

Lose(m) == net' = net \ {m}
           /\ UNCHANGED <<phase, left, row, prev, tl, asg, fails, ans, s, w, last, flight, bad>>

(* Answers ------------------------------------------------------------------------ *)

Answer(a) ==
  LET i == a.i
      v == s[i].ask.v
      r == [s[i] EXCEPT !.ask = NoAsk]
      until == IF R1 THEN Trust - s[i].ask.age ELSE Trust
      how == s[i].ask.how
      held == [Standby(r) EXCEPT !.term = a.term, !.line = a.tl, !.until = until,
                 !.start = IF how = "expired" \/ (how = "died" /\ row.exp) THEN LD ELSE 0] IN
  /\ Awake(i) /\ v # "none"
  /\ ans' = ans \ {a}
  /\ UNCHANGED <<phase, left, row, prev, tl, asg, fails, net, last, flight, bad>>
  /\ CASE v = "acquire" /\ a.ok ->
            /\ Set(i, [held EXCEPT !.ph = IF until > 0 /\ ~(R8 /\ r.stop) THEN "hold" ELSE "reap"])
            /\ UNCHANGED w
       [] v = "renew" /\ a.ok /\ a.tl = r.line /\ (r.until > 0 \/ ~R1) ->
            /\ Set(i, [r EXCEPT !.until = until])
            /\ w' = [w EXCEPT ![i].fence = IF w[i].run THEN until ELSE 0]
       [] v = "renew" /\ (~a.ok \/ a.tl # r.line) ->      \* the term is over: killed without grace
            /\ Set(i, [r EXCEPT !.ph = IF @ = "hold" THEN "reap" ELSE "drain", !.until = 0])
            /\ w' = [w EXCEPT ![i].fence = IF w[i].run THEN Min(@, 0) ELSE 0]
       [] v = "release" -> Set(i, IF w[i].run THEN r ELSE Standby(r)) /\ UNCHANGED w
       [] OTHER -> Set(i, r) /\ UNCHANGED w

GiveUp(i) ==
  /\ Awake(i) /\ ~Idle(i) /\ s[i].ask.age > 0
  /\ Set(i, IF s[i].ph = "reap" THEN Standby(s[i]) ELSE [s[i] EXCEPT !.ask = NoAsk])
  /\ ans' = {a \in ans : a.i # i} /\ net' = Stale(i)
  /\ UNCHANGED <<phase, left, row, prev, tl, asg, fails, w, last, flight, bad>>

(* Work ----------------------------------------------------------------------------- *)

Start(i) ==
  /\ Awake(i) /\ s[i].ph = "hold" /\ s[i].start <= 0 /\ asg = i /\ (R8 => ~s[i].stop)
  /\ IF s[i].until <= 0
     THEN Set(i, [s[i] EXCEPT !.ph = "reap"]) /\ UNCHANGED <<w, last, bad>>
     ELSE /\ Set(i, [s[i] EXCEPT !.ph = "work"])
          /\ w' = [w EXCEPT ![i] = [run |-> TRUE, fence |-> s[i].until]]
          /\ last' = Max(last, s[i].term)
          /\ bad' = IF s[i].term <= last THEN "a term again" ELSE IF flight.ticks > 0 THEN "in flight"
                    ELSE IF s[i].stop THEN "after a stop signal" ELSE bad
  /\ UNCHANGED <<phase, left, row, prev, tl, asg, fails, net, ans, flight>>

\* The assignment went, or a stop signal came: the work is asked to end, and does, or is killed at the end of trust.
Drain(i) == /\ Awake(i) /\ s[i].ph = "work" /\ (asg # i \/ s[i].stop) /\ Set(i, [s[i] EXCEPT !.ph = "drain"])
            /\ UNCHANGED <<phase, left, row, prev, tl, asg, fails, net, ans, w, last, flight, bad>>
Unheld(i) == /\ Awake(i) /\ s[i].ph = "hold" /\ (asg # i \/ s[i].stop) /\ Set(i, [s[i] EXCEPT !.ph = "reap"])
             /\ UNCHANGED <<phase, left, row, prev, tl, asg, fails, net, ans, w, last, flight, bad>>
Ends(i) == /\ w[i].run /\ s[i].ph = "drain" /\ w' = [w EXCEPT ![i] = [run |-> FALSE, fence |-> 0]]
           /\ UNCHANGED <<phase, left, row, prev, tl, asg, fails, net, ans, s, last, flight, bad>>

Over(i) == w[i].run /\ w[i].fence <= 0 /\ (R2 \/ ~s[i].paused)
Kernel(i) == /\ Over(i) /\ w' = [w EXCEPT ![i] = [run |-> FALSE, fence |-> 0]]
             /\ flight' = [term |-> s[i].term, ticks |-> 1]
             /\ UNCHANGED <<phase, left, row, prev, tl, asg, fails, net, ans, s, last, bad>>

Gone(i) ==
  /\ Awake(i) /\ s[i].ph \in {"work", "drain"} /\ ~w[i].run
  /\ Set(i, [s[i] EXCEPT !.ph = "reap", !.ask = NoAsk])
  /\ ans' = {a \in ans : a.i # i} /\ net' = Stale(i)
  /\ UNCHANGED <<phase, left, row, prev, tl, asg, fails, w, last, flight, bad>>

(* Faults ----------------------------------------------------------------------------- *)

Pause(i) == /\ left > 0 /\ Awake(i) /\ left' = left - 1 /\ Set(i, [s[i] EXCEPT !.paused = TRUE])
            /\ UNCHANGED <<phase, row, prev, tl, asg, fails, net, ans, w, last, flight, bad>>
Resume(i) == /\ s[i].paused /\ Set(i, [s[i] EXCEPT !.paused = FALSE])
             /\ UNCHANGED <<phase, left, row, prev, tl, asg, fails, net, ans, w, last, flight, bad>>
\* The work dies with its parent, in the same instant.
Crash(i) == /\ left > 0 /\ Alive(i) /\ left' = left - 1
            /\ Set(i, [Fresh EXCEPT !.ph = "dead"])
            /\ w' = [w EXCEPT ![i] = [run |-> FALSE, fence |-> 0]]
            /\ ans' = {a \in ans : a.i # i} /\ net' = Stale(i)
            /\ UNCHANGED <<phase, row, prev, tl, asg, fails, last, flight, bad>>
Stop(i) == /\ left > 0 /\ Awake(i) /\ ~s[i].stop /\ left' = left - 1 /\ Set(i, [s[i] EXCEPT !.stop = TRUE])
           /\ UNCHANGED <<phase, row, prev, tl, asg, fails, net, ans, w, last, flight, bad>>
Leave(i) == /\ Awake(i) /\ s[i].ph = "standby" /\ s[i].stop /\ Idle(i) /\ R8 /\ row.who # i
            /\ Set(i, [Fresh EXCEPT !.ph = "dead"])
            /\ UNCHANGED <<phase, left, row, prev, tl, asg, fails, net, ans, w, last, flight, bad>>
\* The newcomer's work breaks on its probation: one that is passive has it again.
Fail(i) ==
  /\ left > 0 /\ w[i].run /\ row.prob /\ row.who = i /\ left' = left - 1
  /\ w' = [w EXCEPT ![i] = [run |-> FALSE, fence |-> 0]]
  /\ fails' = [fails EXCEPT ![i] = @ + 1]
  /\ asg' = IF asg = i /\ \E j \in Inst : j # i /\ s[j].ph = "standby"
            THEN CHOOSE j \in Inst : j # i /\ s[j].ph = "standby" ELSE asg
  /\ UNCHANGED <<phase, row, prev, tl, net, ans, s, last, flight, bad>>
\* The last acquire is lost, and what came after it.
FailOver == /\ left > 0 /\ left' = left - 1 /\ tl' = tl + 1 /\ row' = prev
            /\ UNCHANGED <<phase, prev, asg, fails, net, ans, s, w, last, flight, bad>>
\* A release waits for no disk: the server crashes and has not heard of it. It is the same server, on the same
\* timeline. Until the next acquire, which is waited for, and with it what stands before it in the log.
Unheard == /\ left > 0 /\ row.was # 0 /\ left' = left - 1 /\ row' = [row EXCEPT !.who = row.was, !.was = 0]
           /\ UNCHANGED <<phase, prev, tl, asg, fails, net, ans, s, w, last, flight, bad>>
Delete == /\ left > 0 /\ row.there /\ left' = left - 1 /\ row' = [row EXCEPT !.there = FALSE]
          /\ UNCHANGED <<phase, prev, tl, asg, fails, net, ans, s, w, last, flight, bad>>

(* Time --------------------------------------------------------------------------------- *)

\* A supervisor that runs does at once what is due; one that is late is a paused one. So there are fewer states to visit.
Due(i) ==
  LET x == s[i] IN
  Awake(i) /\ CASE x.ph = "standby" -> Idle(i) /\ (~row.there \/ Key # x.key \/ tl # x.seen \/ ~x.cur \/ row.who = i)
                [] x.ph = "hold" -> asg # i \/ x.stop \/ x.start <= 0
                [] x.ph = "work" -> ~w[i].run \/ asg # i \/ x.stop
                [] x.ph = "drain" -> ~w[i].run
                [] x.ph = "reap" -> Idle(i) /\ x.start <= 0 /\ Cardinality(net) < MaxNet
                [] OTHER -> FALSE

Later(x) == [x EXCEPT !.ask.age = IF x.ask.v = "none" THEN 0 ELSE Min(@ + 1, Trust),
                      !.until = IF x.ph \in {"hold", "work", "drain"} THEN Max(@ - 1, 0) ELSE 0,
                      !.start = Max(@ - 1, 0),
                      !.age = IF x.key = NoKey THEN 0 ELSE Min(@ + 1, Patience)]

\* The kernel ends a work within its budget: time does not pass it by.
Tick ==
  /\ \A i \in Inst : ~Due(i) /\ ~(Over(i) /\ w[i].fence <= -KB)
  /\ phase' = (phase + 1) % 4
  /\ s' = [i \in Inst |-> IF (i = 1 /\ phase = 3) \/ ~Alive(i) THEN s[i] ELSE Later(s[i])]
  /\ w' = [i \in Inst |-> IF (i = 1 /\ phase = 3) \/ ~w[i].run THEN w[i]
                          ELSE [w[i] EXCEPT !.fence = Max(@ - 1, -KB)]]
  /\ flight' = NoFlight
  /\ UNCHANGED <<left, row, prev, tl, asg, fails, net, ans, last, bad>>

Next ==
  \/ Tick \/ Edit \/ FailOver \/ Unheard \/ Delete
  \/ \E m \in net : Serve(m) \/ Lose(m)
  \/ \E a \in ans : Answer(a)
  \/ \E i \in Inst : Read(i) \/ PutBack(i) \/ Claim(i) \/ Acquire(i) \/ Unread(i) \/ Renew(i) \/ Release(i)
       \/ GiveBack(i) \/ GiveUp(i) \/ Start(i) \/ Drain(i) \/ Ends(i) \/ Unheld(i) \/ Kernel(i) \/ Gone(i)
       \/ Pause(i) \/ Resume(i) \/ Crash(i) \/ Stop(i) \/ Leave(i) \/ Fail(i)

Spec == Init /\ [][Next]_vars

(* What must hold ----------------------------------------------------------------------- *)

AtMostOne == \A i, j \in Inst : (w[i].run /\ w[j].run) => i = j
NothingBad == bad = "no"
\* A deployment that failed on its probation takes from nobody that lives. (It may be given it: by an operator, which is a
\* fault that is counted, or by one that is stopped.)
Quarantine == [][\A i \in Inst : (asg' = i /\ asg # i /\ asg # 0 /\ fails[i] >= TRIES /\ left' = left /\ net' = net)
                                  => ~Alive(asg)]_vars
=============================================================================
