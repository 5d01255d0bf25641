package backend

import (
	"context"
	"sync"
)

// jobs are what the backend does besides answering requests: making HSM keys and sealing stored material anew. One job of
// a name runs at a time. Each ends when the mount is cleaned up, and the backend waits for it.
type jobs struct {
	mu      sync.Mutex
	running map[string]*job
	group   sync.WaitGroup
}

// job is one that runs.
type job struct {
	// again is set where the job was asked for while it ran: what it is about may have changed, so it runs once more.
	again bool
}

// start runs the job in a goroutine of its own, and returns true; where it runs already, it will run once more. It does
// nothing once ctx, the life of the mount, has ended.
func (j *jobs) start(ctx context.Context, name string, run func(context.Context)) (started bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if ctx.Err() != nil {
		return false
	}
	if running := j.running[name]; running != nil {
		running.again = true
		return false
	}
	if j.running == nil {
		j.running = map[string]*job{}
	}
	running := &job{}
	j.running[name] = running
	j.group.Add(1)
	go func() {
		defer j.group.Done()
		for {
			run(ctx)
			if !j.goOn(ctx, name, running) {
				return
			}
		}
	}()
	return true
}

// goOn tells whether the job is to run once more, and removes it where it is not.
func (j *jobs) goOn(ctx context.Context, name string, running *job) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	if running.again && ctx.Err() == nil {
		running.again = false
		return true
	}
	delete(j.running, name)
	return false
}

// isRunning tells whether a job of that name runs.
func (j *jobs) isRunning(name string) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.running[name] != nil
}

// wait returns when no job runs. The jobs' ctx must have ended.
func (j *jobs) wait() { j.group.Wait() }
